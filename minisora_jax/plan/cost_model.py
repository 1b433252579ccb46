"""What a step costs, reckoned from shapes: arithmetic, memory, traffic and time. A model, where compiled.py has facts.

Time is the longest of computing and of what is sent meanwhile, and after that what is sent while nothing else runs:

    t = max(executed FLOPs / peak, hidden bytes / links) + exposed bytes / links

Memory-bound work (norms, modulation, the optimiser) is not in it, nor is any inefficiency of kernels: so it bounds
the MFU from above.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

from minisora_jax.parallel.mesh import MeshConfig
from minisora_jax.parallel.ring import Ring
from minisora_jax.plan.compiled import CompiledStep, Workload
from minisora_jax.plan.hardware import Chip, Topology
from minisora_jax.plan.schedule import Traffic
from minisora_jax.train.flops import forward_flops

ATTENTION_BACKWARD = 2.5  # five products where forward has two: the weights are computed again


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """FLOPs of a step on all chips together: what the clips need, and what the program does."""

    useful: float
    executed: float


def arithmetic(work: Workload) -> Arithmetic:
    """Useful: forward once, and twice that backward. Executed: what remat computes again, and attention's own."""
    cfg, n, segments = work.task.dit, float(work.tokens), work.rows * work.segments
    frame = n  # one clip of unknown frames: groups other than "joint" are not planned for
    pairs = {"joint": n * n, "spatial": n * frame, "temporal": n * n}
    text = float(cfg.caption_tokens or work.text_tokens)
    whole = segments * forward_flops(cfg, n, text, pairs, n * text, text * text)
    attention = segments * 4.0 * cfg.depth * cfg.width * sum(pairs[g] for g in cfg.attention_pattern)
    if work.sample:
        return Arithmetic(2 * whole, 2 * whole)  # Heun: two evaluations
    again = {"none": 0.0, "matmuls": attention, "attention": whole - attention, "full": whole}[cfg.remat]
    return Arithmetic(3 * whole, 3 * whole + (ATTENTION_BACKWARD - 2) * attention + again)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of one chip: bytes by kind, and the step's time in seconds by part."""

    bytes: dict[str, float]
    seconds: dict[str, float]  # computing, hidden traffic, exposed traffic
    arithmetic: Arithmetic
    chips: int
    chip: Chip

    @property
    def total_bytes(self) -> float:
        return sum(self.bytes.values())

    @property
    def step(self) -> float:
        return max(self.seconds["computing"], self.seconds["hidden"]) + self.seconds["exposed"]

    @property
    def mfu(self) -> float:
        """The bound on model FLOPs utilisation."""
        return self.arithmetic.useful / (self.chips * self.chip.flops * self.step)


def reckon(work: Workload, mesh: MeshConfig, topology: Topology, parameters: int, compiled: CompiledStep | None = None):
    """An Estimate on a mesh whose sizes are all given. With `compiled`, memory and traffic are the compiler's."""
    chip, done = topology.chip, arithmetic(work)
    if compiled:
        memory = {k: float(v) for k, v in compiled.state_bytes.items()}
        memory |= {"temporaries": float(compiled.temporary_bytes), "program": float(compiled.code_bytes)}
        traffic = compiled.traffic
    else:
        memory, traffic = _memory(work, mesh, parameters), _traffic(work, mesh, parameters, topology.slices)
    seconds = {"computing": done.executed / (topology.chips * chip.flops), "hidden": 0.0, "exposed": 0.0}
    for t in traffic:
        seconds["hidden" if t.hidden else "exposed"] += seconds_of(t, mesh, chip)
    return Estimate(memory, seconds, done, topology.chips, chip)


def seconds_of(traffic: Traffic, mesh: MeshConfig, chip: Chip) -> float:
    """Permutes use one link; the others the two of an axis, and all-to-all each byte's mean distance n / 4 as well.

    What goes between slices uses the network.
    """
    if traffic.network:
        return traffic.sent / chip.network
    n = math.prod(getattr(mesh, axis) for axis in traffic.axes)
    if traffic.kind == "collective-permute":
        return traffic.sent / chip.link
    far = max(1.0, n / 4) if traffic.kind == "all-to-all" else 1.0
    return far * traffic.sent / (2 * chip.link)


def _memory(work: Workload, mesh: MeshConfig, parameters: int) -> dict[str, float]:
    cfg, (tokens, shards) = work.task.dit, _local(work, mesh)
    held, wide = 4.0 * parameters / shards, cfg.mlp_ratio
    if work.sample:
        return {"parameters": held, "temporaries": tokens * cfg.width * (2 * 20 + 12 + 4 * wide)}
    # bfloat16 values a token and layer keeps for its gradient, in units of the width
    kept = {"full": 1.0, "attention": 2.0, "matmuls": 8.0 + wide, "none": 22.0 + 3 * wide}[cfg.remat]
    block = 2.0 * tokens * cfg.width * (kept * cfg.depth * len(cfg.attention_pattern) + 12 + 24 + 3 * wide + 8)
    return {"parameters": held, "average": held, "optimiser": 2 * held, "gradient": held, "temporaries": block}


def _local(work: Workload, mesh: MeshConfig) -> tuple[float, int]:
    """(tokens on a chip, chips that a parameter is cut over)."""
    rows = max(1.0, work.rows / (mesh.data * mesh.fsdp))
    return rows * work.row_tokens(mesh) / (mesh.ring * mesh.ulysses), mesh.fsdp * mesh.ring * mesh.ulysses * mesh.tensor


def _traffic(work: Workload, mesh: MeshConfig, parameters: int, slices: int = 1) -> list[Traffic]:
    cfg, (tokens, shards) = work.task.dit, _local(work, mesh)
    layers, passes = (
        cfg.depth * len(cfg.attention_pattern),
        2 if work.sample else 1 + (cfg.remat in ("full", "matmuls")),
    )
    made = []

    def add(kind, axes, hidden, times, sent):
        axes = tuple(a for a in axes if getattr(mesh, a) > 1)
        if axes and times:
            made.append(Traffic(kind, axes, hidden, hidden, 0, int(times), times * sent))

    if mesh.ring > 1:
        kv = 2 * 2.0 * tokens * cfg.width / mesh.tensor
        block = work.row_tokens(mesh) // mesh.ring
        hop_schedule = Ring(None, 1.0, size=mesh.ring, max_segment_len=work.tokens).hop_schedule(block)
        hops, home = sum(j[1] for j in hop_schedule), sum(abs(j[2]) for j in hop_schedule)
        add("collective-permute", ("ring",), True, layers * hops * passes, kv)
        if not work.sample:
            add("collective-permute", ("ring",), True, layers * hops, 3 * kv)
            add("collective-permute", ("ring",), False, layers * home, 2 * kv)
    exchanged = 2.0 * tokens * cfg.width / mesh.tensor * (mesh.ulysses - 1) / mesh.ulysses
    add("all-to-all", ("ulysses",), False, layers * 4 * (passes + (not work.sample)), exchanged)
    weights, cut = 2.0 * parameters / mesh.tensor, ("fsdp", "ring", "ulysses")
    add("all-gather", cut, False, passes, weights)
    if not work.sample:
        add("reduce-scatter", cut, False, 1, weights)
        gradients = 2 * 2.0 * parameters / shards
        if mesh.data > slices:
            add("all-reduce", ("data",), False, 1, gradients)
        if slices > 1:
            made.append(Traffic("all-reduce", ("data",), True, False, 0, 1, gradients * (slices - 1) / slices, True))
    add("all-reduce", ("tensor",), False, layers * 3 * (passes + (not work.sample)), 2 * 2.0 * tokens * cfg.width)
    return made


def search(work: Workload, topology: Topology, parameters: int, remats=("full", "attention", "matmuls", "none")):
    """(task's remat, mesh, Estimate) of every mesh and remat policy that fits the chips, the quickest first."""
    found = []
    for mesh in meshes(topology.chips, work.rows, work.task.dit.heads, topology.slices):
        for remat in remats if not work.sample else (work.task.dit.remat,):
            dit = dataclasses.replace(work.task.dit, remat=remat)
            tried = dataclasses.replace(work, task=dataclasses.replace(work.task, dit=dit))
            estimate = reckon(tried, mesh, topology, parameters)
            if estimate.total_bytes <= 0.95 * topology.chip.memory:
                found.append((tried, mesh, estimate))
    return sorted(found, key=lambda f: f[2].step)


def meshes(chips: int, rows: int, heads: int, slices: int = 1) -> list[MeshConfig]:
    """Every mesh of so many chips on which the rows and heads divide."""
    divisors = [n for n in range(1, chips + 1) if chips % n == 0]
    return [
        MeshConfig(data, fsdp, chips // (data * fsdp * ulysses * tensor), ulysses, tensor)
        for data, fsdp, ulysses, tensor in itertools.product(divisors, repeat=4)
        if rows % (data * fsdp) == 0
        and heads % (ulysses * tensor) == 0
        and chips % (data * fsdp * ulysses * tensor) == 0
        and data % slices == 0
        and tensor <= 8
    ]


def largest(facts: list[tuple[int, float]], memory: float) -> int:
    """Tokens of a clip that fill `memory`, on the line through two (tokens, bytes) that were compiled."""
    (few, less), (many, more) = sorted(facts)
    return int(few + (memory - less) * (many - few) / (more - less))
