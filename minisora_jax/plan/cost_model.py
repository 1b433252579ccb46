"""A model of a step's cost from shapes: arithmetic, memory, traffic and time. compiled.py has the compiler's numbers.

The time of a step is the longer of computing and hidden sending, plus the time of exposed sending:

    t = max(executed FLOPs / peak, hidden bytes / links) + exposed bytes / links

Memory-bound work (norms, modulation, the optimiser) and the inefficiency of kernels are not included. So the model is a
lower bound of the time and an upper bound of the MFU.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

from minisora_jax.models.levels import table_size
from minisora_jax.parallel.kernels import KERNELS
from minisora_jax.parallel.mesh import SHARDS, MeshConfig
from minisora_jax.parallel.ring import Ring
from minisora_jax.plan.compiled import CompiledStep, Workload, state_bytes
from minisora_jax.plan.hardware import Chip, Topology
from minisora_jax.plan.schedule import Traffic
from minisora_jax.training.flops import forward_flops

ATTENTION_BACKWARD = 2.5  # five products where forward has two, because the weights are recomputed


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """FLOPs of a step on all chips together."""

    useful: float  # for the clips
    executed: float  # with the recomputation of remat and of attention's backward pass


def arithmetic(work: Workload) -> Arithmetic:
    """The FLOPs of a step. The backward pass has twice the useful FLOPs of the forward pass."""
    cfg, n, segments = work.task.dit, float(work.tokens), work.rows * work.segments
    # A workload has no frames, so "spatial" and "temporal" attention count as "joint", which is too much.
    pairs: dict[str, float] = {kind: n * n for kind in ("joint", "spatial", "temporal")}
    text = float(cfg.caption_tokens or work.text_tokens)
    levels = float(work.frames) if table_size(work.row_frames, round(work.segments * n)) else None
    forward = segments * forward_flops(cfg, n, text, pairs, n * text, text * text, levels)
    attention = segments * 4.0 * cfg.depth * cfg.width * sum(pairs[kind] for kind in cfg.attention_kinds)
    if work.sample:
        return Arithmetic(2 * forward, 2 * forward)  # Heun's sampler has two model calls a step
    recomputed = {"none": 0.0, "matmuls": attention, "attention": forward - attention}.get(cfg.remat, forward)
    # A frozen model has no gradients of weights.
    spared = forward_flops(cfg, n, text, dict.fromkeys(pairs, 0.0), 0, 0) * segments if work.task.lora.rank else 0.0
    useful = 3 * forward - spared
    return Arithmetic(useful, useful + (ATTENTION_BACKWARD - 2) * attention + recomputed)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The modelled cost of a step."""

    bytes: dict[str, float]  # of one chip, by kind
    seconds: dict[str, float]  # "computing", and "hidden" and "exposed" traffic
    arithmetic: Arithmetic
    chips: int
    chip: Chip

    @property
    def total_bytes(self) -> float:
        """Bytes of one chip."""
        return sum(self.bytes.values())

    @property
    def step(self) -> float:
        """Seconds of a step, a lower bound."""
        return max(self.seconds["computing"], self.seconds["hidden"]) + self.seconds["exposed"]

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation, an upper bound."""
        return self.arithmetic.useful / (self.chips * self.chip.flops * self.step)


def estimate(
    work: Workload, mesh: MeshConfig, topology: Topology, parameters: int, compiled: CompiledStep | None = None
) -> Estimate:
    """The modelled cost of a step.

    Args:
        work: The step.
        mesh: The mesh, with the size of every axis.
        topology: The chips.
        parameters: The number of the model's parameters.
        compiled: The compiled step. If given, memory and traffic are the compiler's.
    """
    if compiled:
        return cost_of(compiled, arithmetic(work), mesh, topology)
    traffic = _traffic(work, mesh, parameters, topology.slices)
    return _cost(_memory(work, mesh, parameters), traffic, arithmetic(work), mesh, topology)


def cost_of(compiled: CompiledStep, flops: Arithmetic, mesh: MeshConfig, topology: Topology) -> Estimate:
    """The cost of a compiled step: memory and traffic are the compiler's."""
    memory = {k: float(v) for k, v in compiled.state_bytes.items()}
    memory |= {"temporaries": float(compiled.temporary_bytes), "program": float(compiled.code_bytes)}
    return _cost(memory, compiled.traffic, flops, mesh, topology)


def _cost(
    memory: dict[str, float], traffic: Sequence[Traffic], flops: Arithmetic, mesh: MeshConfig, topology: Topology
) -> Estimate:
    chip = topology.chip
    seconds = {"computing": flops.executed / (topology.chips * chip.flops), "hidden": 0.0, "exposed": 0.0}
    for t in traffic:
        seconds["hidden" if t.hidden else "exposed"] += seconds_of(t, mesh, chip)
    return Estimate(memory, seconds, flops, topology.chips, chip)


def seconds_of(traffic: Traffic, mesh: MeshConfig, chip: Chip) -> float:
    """The seconds that a chip's traffic takes at peak rates.

    A permute uses one link. Other collectives use the two links of an axis; in an all-to-all each byte also travels
    n / 4 links on average. Traffic between slices uses the network. Copies to the host count as nothing: no data sheet
    has their rate.
    """
    if not traffic.axes:
        return 0.0
    if traffic.network:
        return traffic.sent / chip.network
    n = math.prod(getattr(mesh, axis) for axis in traffic.axes)
    if traffic.kind == "collective-permute":
        return traffic.sent / chip.link
    distance = max(1.0, n / 4) if traffic.kind == "all-to-all" else 1.0
    return distance * traffic.sent / (2 * chip.link)


def _memory(work: Workload, mesh: MeshConfig, parameters: int) -> dict[str, float]:
    """Bytes of one chip by kind, estimated from shapes."""
    cfg, (tokens, shards) = work.task.dit, _per_chip(work, mesh)
    weights, ratio = 4.0 * parameters / shards, cfg.mlp_ratio
    if work.sample:
        stored = weights / (2 if work.weights == "bfloat16" else 1)
        return {"parameters": stored, "temporaries": tokens * cfg.width * (2 * 20 + 12 + 4 * ratio)}
    # bfloat16 values that each token keeps in each block for its gradient, in units of the width
    kept = {"host": 0.0, "full": 1.0, "attention": 2.0, "matmuls": 8.0 + ratio, "none": 22.0 + 3 * ratio}[cfg.remat]
    temporaries = 2.0 * tokens * cfg.width * (kept * cfg.depth * len(cfg.attention_kinds) + 12 + 24 + 3 * ratio + 8)
    state = {kind: held / shards for kind, held in state_bytes(work.task).items()}
    return state | {"temporaries": temporaries}


def _per_chip(work: Workload, mesh: MeshConfig) -> tuple[float, int]:
    """(tokens on a chip, chips that a parameter is sharded over)."""
    rows = max(1.0, work.rows / (mesh.data * mesh.fsdp))
    return rows * work.row_tokens(mesh) / (mesh.ring * mesh.ulysses), mesh.fsdp * mesh.ring * mesh.ulysses * mesh.tensor


def _traffic(work: Workload, mesh: MeshConfig, parameters: int, slices: int = 1) -> list[Traffic]:
    """The traffic of a step, estimated from shapes."""
    cfg, (tokens, shards) = work.task.dit, _per_chip(work, mesh)
    layers = cfg.depth * len(cfg.attention_kinds)
    passes = 2 if work.sample else 1 + (cfg.remat in ("full", "host", "matmuls"))  # passes through attention's forward
    traffic: list[Traffic] = []

    def add(kind: str, axes: tuple[str, ...], hidden: bool, times: int, sent: float) -> None:
        """Add collectives that run `times` times and send `sent` bytes each, along the axes above 1."""
        axes = tuple(axis for axis in axes if getattr(mesh, axis) > 1)
        if axes and times:
            traffic.append(Traffic(kind, axes, hidden, hidden, 0, times, times * sent))

    if mesh.ring > 1:
        kv = 2 * 2.0 * tokens * cfg.width / mesh.tensor
        block = work.row_tokens(mesh) // mesh.ring
        ring = Ring(KERNELS["reference"], 1.0, size=mesh.ring, max_segment_len=work.tokens)
        trips = ring.hop_schedule(block)
        hops, home = sum(trip.hops for trip in trips), sum(abs(trip.hops_home) for trip in trips)
        add("collective-permute", ("ring",), True, layers * hops * passes, kv)
        if not work.sample:
            add("collective-permute", ("ring",), True, layers * hops, 3 * kv)
            add("collective-permute", ("ring",), False, layers * home, 2 * kv)
    exchanged = 2.0 * tokens * cfg.width / mesh.tensor * (mesh.ulysses - 1) / mesh.ulysses
    add("all-to-all", ("ulysses",), False, layers * 4 * (passes + (not work.sample)), exchanged)
    weights = 2.0 * parameters / mesh.tensor
    add("all-gather", SHARDS, False, passes, weights)
    if not work.sample:
        trained = state_bytes(work.task)["gradient"] / 4
        add("reduce-scatter", SHARDS, False, 1, 2.0 * trained / mesh.tensor)
        gradients = 2 * 2.0 * trained / shards
        if mesh.data > slices:
            add("all-reduce", ("data",), False, 1, gradients)
        if slices > 1:
            sent = gradients * (slices - 1) / slices
            traffic.append(Traffic("all-reduce", ("data",), True, False, 0, 1, sent, True))
    add("all-reduce", ("tensor",), False, layers * 3 * (passes + (not work.sample)), 2 * 2.0 * tokens * cfg.width)
    return traffic


def search(work: Workload, topology: Topology, parameters: int) -> list[tuple[Workload, MeshConfig, Estimate]]:
    """Every mesh and remat policy that fits 95 % of the chips' memory, the quickest first.

    Args:
        work: The step. Its remat policy is replaced, except in a sampling step.
        topology: The chips.
        parameters: The number of the model's parameters.

    Returns:
        [(the step with its remat policy, mesh, estimate)].
    """
    plans = []
    for mesh in meshes(topology.chips, work.rows, work.task.dit.heads, topology.slices):
        for remat in ("full", "attention", "matmuls", "none", "host") if not work.sample else (work.task.dit.remat,):
            dit = dataclasses.replace(work.task.dit, remat=remat)
            candidate = dataclasses.replace(work, task=dataclasses.replace(work.task, dit=dit))
            cost = estimate(candidate, mesh, topology, parameters)
            if cost.total_bytes <= 0.95 * topology.chip.memory:
                plans.append((candidate, mesh, cost))
    return sorted(plans, key=lambda plan: plan[2].step)


def meshes(chips: int, rows: int, heads: int, slices: int = 1) -> list[MeshConfig]:
    """Every mesh of `chips` chips that divides the rows and heads. The tensor axis has at most 8 chips."""
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


def largest(points: Sequence[tuple[float, float]], memory: float) -> int:
    """The tokens of a clip that fill `memory`, on the line through two compiled points (tokens, bytes)."""
    (few, less), (many, more) = sorted(points)
    return int(few + (memory - less) * (many - few) / (more - less))
