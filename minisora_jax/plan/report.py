"""Prints plans: the numbers of compiled steps, the modelled cost, and tables of meshes."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version

from minisora_jax.parallel.mesh import MeshConfig
from minisora_jax.plan.compiled import CompiledStep, Workload, compile_for
from minisora_jax.plan.cost_model import (
    Arithmetic,
    Estimate,
    arithmetic,
    cost_of,
    estimate,
    largest,
    search,
    seconds_of,
)
from minisora_jax.plan.hardware import Topology

GIB = 2**30


def compile_and_print(work: Workload, mesh: MeshConfig, topology: Topology) -> CompiledStep:
    """Compile a step and print its numbers."""
    remat = work.task.dit.remat
    print(f"\nmesh {mesh_name(mesh)}, remat {remat}: compiling for {topology.chips} chips ...", flush=True)
    compiled = compile_for(work, mesh, topology)
    tokens, step = work.row_tokens(mesh), "sampling step" if work.sample else "train step"
    each = tokens * work.rows / (mesh.data * mesh.fsdp * mesh.ring * mesh.ulysses)
    what = f"{step} of {work.rows} row{'s' * (work.rows > 1)} of {tokens:,} tokens ({each:,.0f} a chip)"
    advice = "try a larger mesh, another remat policy (--remat) or --search"
    print("\n".join(compiled_lines(what, advice, arithmetic(work), mesh, topology, compiled)), flush=True)
    return compiled


def mesh_name(mesh: MeshConfig) -> str:
    """The axes of a mesh that are larger than 1, such as "ring=4 ulysses=2"."""
    return " ".join(f"{axis}={n}" for axis, n in dataclasses.asdict(mesh).items() if n > 1) or "of one chip"


def compiled_lines(
    what: str, advice: str, flops: Arithmetic, mesh: MeshConfig, topology: Topology, compiled: CompiledStep
) -> list[str]:
    """The lines of text about a compiled step: memory, traffic, and the cost that follows from them.

    Args:
        what: The step, in words.
        advice: What to try if it does not fit.
        flops: Its arithmetic.
        mesh: The mesh.
        topology: The chips.
        compiled: The compiler's numbers.
    """
    by = f"by libtpu {version('libtpu')} in {compiled.seconds:.0f} s on this machine"
    lines = [f"compiled for {topology.kind}: {what}, {by}"]
    verdict, memory = "fits" if compiled.fits else "DOES NOT FIT", topology.chip.memory
    lines.append(f"  memory of a chip   {compiled.total_bytes / GIB:.2f} GiB of {memory / GIB:.1f}: {verdict}")
    for kind, count in compiled.state_bytes.items():
        lines.append(f"    {kind:<17}{count / GIB:8.3f} GiB")
    if not compiled.fits:
        return [*lines, f"  {advice}"]
    lines.append(f"    {'temporaries':<17}{compiled.temporary_bytes / GIB:8.3f} GiB (activations, gradients, buffers)")
    lines.append(f"    {'program':<17}{compiled.code_bytes / GIB:8.3f} GiB")
    lines.append("  sent by a chip in a step, by mesh axis")
    for t in compiled.traffic:
        how = "asynchronous, hidden" if t.hidden else "asynchronous, exposed" if t.asynchronous else "synchronous"
        count = f"{t.times:,} times from {t.sites} places"
        lines.append(f"    {t.where:<17}{t.kind:<19}{t.sent / GIB:10.3f} GiB, {count}, {how}")
    cost = cost_of(compiled, flops, mesh, topology)
    if copied := sum(t.sent for t in compiled.traffic if not t.axes):
        rate = copied / cost.seconds["computing"] / 1e9
        lines.append(f"    the host must take and give {rate:.2g} GB/s a chip for its copies to stay hidden")
    return [*lines, *cost_lines(cost, compiled, mesh)]


def cost_lines(cost: Estimate, compiled: CompiledStep | None, mesh: MeshConfig) -> list[str]:
    """The lines of text about a modelled cost."""
    chip, seconds, flops = cost.chip, cost.seconds, cost.arithmetic
    lines = [
        f"  modelled, from peaks: {chip.flops / 1e12:.0f} TFLOP/s, {chip.link / 1e9:.0f} GB/s a link",
        f"    FLOPs            {flops.useful:.3e} useful, {flops.executed:.3e} executed",
        f"    step             {cost.step:.3g} s at least: computing {seconds['computing']:.3g}, sending"
        f" {seconds['hidden']:.3g} meanwhile and {seconds['exposed']:.3g} alone",
        f"    MFU              {100 * cost.mfu:.1f} % at most",
    ]
    if compiled:
        slowest = max(compiled.traffic, key=lambda t: seconds_of(t, mesh, chip), default=None)
        if slowest:
            seconds_sent = seconds_of(slowest, mesh, chip)
            lines.append(f"    longest to send  {slowest.kind} along {slowest.where}: {seconds_sent:.3g} s")
    return lines


def print_search(
    work: Workload, topology: Topology, parameters: int, count: int, default: MeshConfig
) -> list[tuple[Workload, MeshConfig, Estimate]]:
    """Print a table of the best meshes and remat policies, by the cost model.

    Args:
        work: The step.
        topology: The chips.
        parameters: The number of the model's parameters.
        count: Rows of the table.
        default: A mesh for the error message, if none fits.

    Returns:
        All that fit, the quickest first, see `search`.

    Raises:
        ValueError: No mesh fits.
    """
    plans = search(work, topology, parameters)
    kind = f"{topology.chips} x {topology.kind}"
    if not topology.is_tpu:
        print(f"{kind}: modelled from shapes and data sheets; nothing is compiled for GPUs")
    if not plans:
        cost = estimate(work, default, topology, parameters)
        raise ValueError(
            f"no mesh of {kind} holds this step: {mesh_name(default)} needs {cost.total_bytes / GIB:.1f} GiB a chip of "
            f"{topology.chip.memory / GIB:.1f}; take more chips, or a shorter clip"
        )
    print(f"\n{len(plans)} meshes and remat policies fit; the quickest by the model (not compiled):")
    print(f"  {'mesh':<32}{'remat':<11}{'GiB a chip':>11}{'step, s':>11}{'MFU at most':>13}")
    for candidate, mesh, cost in plans[:count]:
        print(
            f"  {mesh_name(mesh):<32}{candidate.task.dit.remat:<11}{cost.total_bytes / GIB:>11.1f}{cost.step:>11.3g}"
            f"{100 * cost.mfu:>12.1f}%"
        )
    _, mesh, cost = plans[0]
    print("\n".join(cost_lines(cost, None, mesh)))
    return plans


def print_largest(work: Workload, mesh: MeshConfig, topology: Topology, compiled: CompiledStep) -> None:
    """Print the longest clip that fits: extrapolated from two compiled lengths, then compiled itself."""
    memory = topology.chip.memory
    half = dataclasses.replace(work, tokens=work.tokens // 2, frames=work.frames // 2)
    other = compile_for(half, mesh, topology)
    points = [(w.tokens, c.total_bytes) for w, c in ((work, compiled), (half, other))]
    tokens = largest(points, 0.97 * memory)
    longest = compile_for(
        dataclasses.replace(work, tokens=tokens, frames=work.frames * tokens // work.tokens), mesh, topology
    )
    lengths = [
        f"{n:,} tokens take {c.total_bytes / GIB:.2f} GiB" for n, c in ((half.tokens, other), (work.tokens, compiled))
    ]
    limit = f"{0.97 * memory / GIB:.2f} GiB at {tokens:,} tokens"
    print(f"\n{' and '.join(lengths)}; the line through both reaches {limit}")
    fits = "fits" if longest.fits else "does not fit"
    print(f"compiled, these take {longest.total_bytes / GIB:.2f} GiB of {memory / GIB:.1f}: {fits}")
