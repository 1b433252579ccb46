"""Scaling studies: time, memory and useful work of a train step over contexts, meshes, kernels and ways to batch.

On real devices steps are run and timed. For a described TPU topology they are compiled, which gives memory and traffic;
the time is modelled (cost_model.py). Each row of the result names its method.

    packed    several clips in each row, as this project trains
    padded    one clip in each row; all rows are as long as the longest clip
    bucketed  one clip in each row; rows are as long as their clip, with one program for each length
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from minisora_jax.data.packing import PackConfig, pack_rows
from minisora_jax.data.rows import Segment, pack_segments
from minisora_jax.io.progress import Progress
from minisora_jax.models.text import encode_bytes
from minisora_jax.parallel.mesh import MeshConfig, make_mesh, to_global
from minisora_jax.parallel.programs import memory_of
from minisora_jax.plan.compiled import Workload, compile_for
from minisora_jax.plan.cost_model import arithmetic, estimate
from minisora_jax.plan.hardware import Topology
from minisora_jax.plan.report import mesh_name
from minisora_jax.plan.table import write_csv
from minisora_jax.training.diffusion_task import DiffusionTask, init_params, loss_of, optimizer_of
from minisora_jax.training.step import init_state, jit_train_step
from minisora_jax.types import PackedBatch

BATCHING = ("packed", "padded", "bucketed")


@dataclasses.dataclass(frozen=True)
class Case:
    """The settings of one row of a study."""

    context: int  # tokens of a row
    clips: int  # of a packed row; equally long unless `mixed`
    batching: str  # one of BATCHING
    mixed: bool  # one video takes half of the tokens; images of 1 / 16 of its tokens fill the rest
    attention: str
    remat: str
    mesh: MeshConfig


@dataclasses.dataclass(frozen=True)
class Result:
    """The numbers of one case."""

    case: Case
    how: str  # "measured", "compiled" or "compiled: does not fit"
    seconds: float  # of a step; modelled if the step was only compiled
    cpu_seconds: float  # of the process in a step, if the devices share a CPU's cores; otherwise nan
    bytes: float  # of one device, by the compiler
    useful_tokens: int  # of a step
    useful_flops: float  # of a step
    mfu: float  # share of the peak that was given, or of the chip's peak; nan without a peak

    def entries(self) -> dict[str, Any]:
        """The row of results.csv."""
        case = dataclasses.asdict(self.case) | {"mesh": mesh_name(self.case.mesh)}
        rest = {k: v for k, v in dataclasses.asdict(self).items() if k != "case"}
        return case | rest | {"useful_tokens_per_s": self.useful_tokens / self.seconds}


def clip_lengths(case: Case) -> list[int]:
    """The tokens of each clip of one packed row, in whole frames of 16 tokens."""
    if not case.mixed:
        return [max(case.context // case.clips // 16, 1) * 16] * case.clips
    video = case.context // 2 // 16 * 16
    image = max(video // 16 // 16, 1) * 16
    return [video, *[image] * ((case.context - video) // image)]


def batches(case: Case, rows: int) -> list[tuple[int, list[list[int]]]]:
    """The batches that train on the clips of `rows` packed rows: [(tokens of a row, [tokens of each clip] by row)]."""
    lengths = clip_lengths(case) * rows
    parts = math.prod((case.mesh.ring, case.mesh.ulysses))
    padded = lambda n: -(-n // parts) * parts
    if case.batching == "packed":
        pack = PackConfig(tokens=case.context, text_tokens=4 * len(lengths), slots=len(lengths), rows=rows)
        packed = pack_rows(np.array(lengths), np.full(len(lengths), 4), pack, 0, 0)
        return [(case.context, [[lengths[i] for i in row] for row in packed])]
    if case.batching == "padded":
        return [(padded(max(lengths)), [[n] for n in lengths])]
    buckets = defaultdict(list)
    for n in lengths:
        buckets[n].append([n])
    return [(padded(n), bucket) for n, bucket in sorted(buckets.items())]


def measure(task: DiffusionTask, case: Case, rows: int, *, repeats: int, peak: float | None) -> Result:
    """Run and time the train step on this machine's devices.

    Args:
        task: The training task.
        case: The case.
        rows: Packed rows whose clips are trained on.
        repeats: Steps that are timed after the first; the result is their median.
        peak: FLOPs per second of a device, for the MFU; None: no MFU.
    """
    task = _task_for(task, case)
    mesh = make_mesh(case.mesh)
    optim = task.run.optim
    optimizer = optimizer_of(task)
    seconds = cpu_seconds = device_bytes = flops = 0.0
    tokens = 0
    with jax.set_mesh(mesh):
        state = jax.jit(lambda k: init_state(init_params(task, k), optimizer, optim.ema > 0))(jax.random.key(0))
        step = jit_train_step(loss_of(task), optimizer, optim)
        for length, clips in batches(case, rows):
            batch = to_global(_random_batch(task, length, clips, mesh), mesh)
            compiled = step.lower(state, batch, jax.random.key(1)).compile()
            memory = memory_of(compiled)
            device_bytes = max(device_bytes, memory.temp_size_in_bytes + memory.argument_size_in_bytes)
            times = []
            for _ in range(repeats + 1):
                begin = np.array([time.perf_counter(), time.process_time()])
                state, metrics = compiled(state, batch, jax.random.key(1))
                float(metrics["loss"])
                times.append(np.array([time.perf_counter(), time.process_time()]) - begin)
            seconds, cpu_seconds = (seconds, cpu_seconds) + np.median(times[1:], axis=0)
            for n in (n for row in clips for n in row):
                tokens, flops = tokens + n, flops + arithmetic(Workload(task, n, text_tokens=4)).useful
    mfu = flops / (seconds * peak * mesh.size) if peak else math.nan
    on_cpu = jax.default_backend() == "cpu"
    return Result(case, "measured", seconds, cpu_seconds if on_cpu else math.nan, device_bytes, tokens, flops, mfu)


def compile_case(task: DiffusionTask, case: Case, rows: int, topology: Topology) -> Result:
    """Compile the packed train step for a TPU topology. Its time is modelled."""
    work = Workload(_task_for(task, case), case.context // case.clips, case.clips, rows, text_tokens=128)
    compiled = compile_for(work, case.mesh, topology)
    cost = estimate(work, case.mesh, topology, compiled.parameters, compiled if compiled.fits else None)
    useful = rows * case.clips * work.tokens
    return Result(
        case,
        "compiled" if compiled.fits else "compiled: does not fit",
        cost.step,
        math.nan,
        compiled.total_bytes,
        useful,
        cost.arithmetic.useful,
        cost.mfu,
    )


def _task_for(task: DiffusionTask, case: Case) -> DiffusionTask:
    dit = dataclasses.replace(task.dit, attention=case.attention, remat=case.remat)
    return dataclasses.replace(task, dit=dit)


def _random_batch(task: DiffusionTask, length: int, clips: list[list[int]], mesh: jax.sharding.Mesh) -> PackedBatch:
    """A batch (1, B, ...) of noise, with rows added until the mesh divides them."""
    rng, width, features = np.random.default_rng(0), task.dit.token_width, task.dit.text_features
    text = encode_bytes("") if features == 1 else np.zeros((4, features), np.float32)

    def segment(n: int) -> Segment:
        tokens = rng.standard_normal((n, width)).astype(np.float32)
        return Segment(tokens, np.zeros(n, bool), (n // 16, 4, 4), text, 8.0)

    slots, parts = max(len(row) for row in clips), mesh.shape["data"] * mesh.shape["fsdp"]
    rows = [[segment(n) for n in row] for row in clips]
    rows += [[segment(16)] for _ in range(-len(rows) % parts)]
    pack = PackConfig(tokens=length, text_tokens=4 * slots, slots=slots, rows=len(rows))
    batch = pack_segments(rows, pack, max(n for row in clips for n in row), task.dit.action_width)
    return jax.tree.map(lambda x: x[None], batch)


def run(
    task: DiffusionTask,
    cases: Sequence[Case],
    *,
    rows: int = 1,
    topology: Topology | None = None,
    repeats: int = 3,
    peak: float | None = None,
) -> Iterator[Result]:
    """Yields the result of each case, with a progress bar.

    Args:
        task: The training task.
        cases: The cases.
        rows: Packed rows whose clips are trained on.
        topology: Compile for these TPUs; None: measure on this machine's devices.
        repeats: See `measure`.
        peak: See `measure`.
    """
    for case in Progress(cases, desc="study", unit="case"):
        if topology:
            yield compile_case(task, case, rows, topology)
        else:
            yield measure(task, case, rows, repeats=repeats, peak=peak)


# ---- Reports


def write(results: Sequence[Result], out: Path, title: str) -> None:
    """Write results.csv, README.md and plots of step time, memory and MFU against context under `out`."""
    out.mkdir(parents=True, exist_ok=True)
    rows = [r.entries() for r in results]
    write_csv(out / "results.csv", rows)
    plots = _plots(results, out)
    text = [f"# {title}", "", *(f"![{name}]({name})" for name in plots), "", *_markdown(results)]
    (out / "README.md").write_text("\n".join(text) + "\n", encoding="utf-8")


def _markdown(results: Sequence[Result]) -> list[str]:
    lines = [
        "| context | clips | batching | attention | remat | mesh | how | s a step | CPU s | GiB | tokens/s | MFU |",
        "|--:|--:|---|---|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for r in results:
        c, mfu = r.case, "" if math.isnan(r.mfu) else f"{100 * r.mfu:.1f} %"
        cpu = "" if math.isnan(r.cpu_seconds) else f"{r.cpu_seconds:.3g}"
        clips = "mixed" if c.mixed else str(c.clips)
        lines.append(
            f"| {c.context:,} | {clips} | {c.batching} | {c.attention} | {c.remat} | {mesh_name(c.mesh)} | {r.how} | "
            f"{r.seconds:.3g} | {cpu} | {r.bytes / 2**30:.2f} | {r.useful_tokens / r.seconds:,.0f} | {mfu} |"
        )
    return lines


def _plots(results: Sequence[Result], out: Path) -> list[str]:
    """Write the plots, with a line for each setting over contexts. Returns their file names."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = []
    for name, label, value in (
        ("step_time.png", "seconds a step", lambda r: r.seconds),
        ("memory.png", "GiB a device", lambda r: r.bytes / 2**30),
        ("mfu.png", "MFU, %", lambda r: 100 * r.mfu),
    ):
        lines = defaultdict(list)
        for r in results:
            if not math.isnan(value(r)):
                lines[_setting(r.case, results)].append((r.case.context, value(r)))
        if not lines or max(map(len, lines.values())) < 2:
            continue
        figure, axes = plt.subplots(figsize=(7, 4.5), constrained_layout=True)
        for setting, points in lines.items():
            axes.plot(*zip(*sorted(points)), marker="o", label=setting)
        axes.set(xlabel="context, tokens", ylabel=label, xscale="log")
        axes.set_xticks(contexts := sorted({r.case.context for r in results}), [_tokens(n) for n in contexts])
        if name != "mfu.png":
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
        axes.xaxis.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        figure.savefig(out / name, dpi=120)
        plt.close(figure)
        names.append(name)
    return names


def _tokens(n: int) -> str:
    return f"{n / 1e6:g} M" if n % 100_000 == 0 else f"{n / 1024:g} k"


def _setting(case: Case, results: Sequence[Result]) -> str:
    """The settings of a case that differ within the study, other than the context."""
    entries, others = _entries(case), [_entries(r.case) for r in results]
    return ", ".join(v for k, v in entries.items() if len({o[k] for o in others}) > 1) or entries["mesh"]


def _entries(case: Case) -> dict[str, str]:
    entries = {"mesh": mesh_name(case.mesh), "clips": "mixed" if case.mixed else f"{case.clips} clips"}
    return entries | {k: getattr(case, k) for k in ("batching", "attention", "remat")}
