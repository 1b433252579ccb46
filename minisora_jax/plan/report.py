"""Plans in words: what was compiled, and what follows from it by arithmetic."""

from __future__ import annotations

import dataclasses

from minisora_jax.parallel.mesh import MeshConfig
from minisora_jax.plan.compiled import CompiledStep, Workload, compile_for
from minisora_jax.plan.cost_model import Estimate, largest, reckon, search, seconds_of
from minisora_jax.plan.hardware import Topology

GIB = 2**30


def compile_and_print(work: Workload, mesh: MeshConfig, topology: Topology) -> CompiledStep:
    print(f"\nmesh {named(mesh)}, remat {work.task.dit.remat}: compiling for {topology.chips} chips ...", flush=True)
    compiled = compile_for(work, mesh, topology)
    print("\n".join(facts(work, mesh, topology, compiled)), flush=True)
    return compiled


def named(mesh: MeshConfig) -> str:
    return " ".join(f"{axis}={n}" for axis, n in dataclasses.asdict(mesh).items() if n > 1) or "of one chip"


def facts(work: Workload, mesh: MeshConfig, topology: Topology, compiled: CompiledStep) -> list[str]:
    tokens, chip, step = work.row_tokens(mesh), topology.chip, "sampling step" if work.sample else "train step"
    each = tokens * work.rows / (mesh.data * mesh.fsdp * mesh.ring * mesh.ulysses)
    lines = [
        f"compiled for {topology.kind}: {step} of {work.rows} row{'s' * (work.rows > 1)} of {tokens:,} tokens"
        f" ({each:,.0f} a chip), in {compiled.seconds:.0f} s on this machine",
    ]
    verdict = "fits" if compiled.fits else "DOES NOT FIT"
    lines.append(f"  memory of a chip   {compiled.total_bytes / GIB:.2f} GiB of {chip.memory / GIB:.1f}: {verdict}")
    for kind, count in compiled.state_bytes.items():
        lines.append(f"    {kind:<17}{count / GIB:8.3f} GiB")
    if not compiled.fits:
        return [*lines, "  a larger mesh, another remat policy (--remat) or --search may do"]
    lines.append(f"    {'temporaries':<17}{compiled.temporary_bytes / GIB:8.3f} GiB (activations, gradients, buffers)")
    lines.append(f"    {'program':<17}{compiled.code_bytes / GIB:8.3f} GiB")
    lines.append("  sent by a chip in a step, by mesh axis")
    for t in compiled.traffic:
        how = "asynchronous, hidden" if t.hidden else "asynchronous, exposed" if t.asynchronous else "synchronous"
        count = f"{t.times:,} times from {t.sites} places"
        lines.append(f"    {t.where:<17}{t.kind:<19}{t.sent / GIB:10.3f} GiB, {count}, {how}")
    return [*lines, *model(reckon(work, mesh, topology, compiled.parameters, compiled), compiled, mesh)]


def model(estimate: Estimate, compiled: CompiledStep | None, mesh: MeshConfig) -> list[str]:
    chip, seconds = estimate.chip, estimate.seconds
    done = estimate.arithmetic
    lines = [
        f"  modelled, from peaks: {chip.flops / 1e12:.0f} TFLOP/s, {chip.link / 1e9:.0f} GB/s a link",
        f"    FLOPs            {done.useful:.3e} useful, {done.executed:.3e} executed",
        f"    step             {estimate.step:.3g} s at least: computing {seconds['computing']:.3g}, sending"
        f" {seconds['hidden']:.3g} meanwhile and {seconds['exposed']:.3g} alone",
        f"    MFU              {100 * estimate.mfu:.1f} % at most",
    ]
    if compiled:
        slow = max(compiled.traffic, key=lambda t: seconds_of(t, mesh, chip), default=None)
        if slow:
            lines.append(f"    longest to send  {slow.kind} along {slow.where}: {seconds_of(slow, mesh, chip):.3g} s")
    return lines


def print_search(work: Workload, topology: Topology, parameters: int, count: int, given: MeshConfig | None):
    """The best meshes and remat policies as a table; all of it is a model. Returns them."""
    found = search(work, topology, parameters)
    kind = f"{topology.chips} x {topology.kind}"
    if not topology.is_tpu:
        print(f"{kind}: reckoned from shapes and data sheets; nothing is compiled for GPUs here")
    if not found:
        alone = reckon(work, given, topology, parameters)
        raise ValueError(
            f"no mesh of {kind} holds this: {named(given)} would take {alone.total_bytes / GIB:.1f} GiB a chip of "
            f"{topology.chip.memory / GIB:.1f}; take more chips, or a shorter clip"
        )
    print(f"\n{len(found)} meshes and remat policies fit; the quickest by the model (not compiled):")
    print(f"  {'mesh':<32}{'remat':<11}{'GiB a chip':>11}{'step, s':>11}{'MFU at most':>13}")
    for tried, mesh, estimate in found[:count]:
        print(
            f"  {named(mesh):<32}{tried.task.dit.remat:<11}{estimate.total_bytes / GIB:>11.1f}{estimate.step:>11.3g}"
            f"{100 * estimate.mfu:>12.1f}%"
        )
    print("\n".join(model(found[0][2], None, found[0][1])))
    return found


def print_largest(work: Workload, mesh: MeshConfig, topology: Topology, compiled: CompiledStep) -> None:
    """The longest clip that fits, guessed on a line through two compiled lengths and then compiled itself."""
    memory = topology.chip.memory
    half = dataclasses.replace(work, tokens=work.tokens // 2)
    other = compile_for(half, mesh, topology)
    points = [(w.tokens, c.total_bytes) for w, c in ((work, compiled), (half, other))]
    tokens = largest(points, 0.97 * memory)
    longest = compile_for(dataclasses.replace(work, tokens=tokens), mesh, topology)
    said = [
        f"{n:,} tokens take {c.total_bytes / GIB:.2f} GiB" for n, c in ((half.tokens, other), (work.tokens, compiled))
    ]
    print(f"\n{' and '.join(said)}; the line through both reaches {0.97 * memory / GIB:.2f} GiB at {tokens:,} tokens")
    fits = "fits" if longest.fits else "does not fit"
    print(f"compiled, these take {longest.total_bytes / GIB:.2f} GiB of {memory / GIB:.1f}: {fits}")
