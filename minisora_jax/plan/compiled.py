"""The real train step or sampling step, compiled for a TPU pod on any machine. `libtpu` contains the compiler.

Nothing is computed or allocated: state and batch are shapes with shardings on the topology's mesh. A step that does not
fit a chip's memory fails as on the pod. Use a process of its own, started with JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from minisora_jax.diffusion.grpo import Rollout
from minisora_jax.diffusion.guidance import GuidanceConfig
from minisora_jax.diffusion.sampler import SAMPLERS
from minisora_jax.generate.sampling import STEPS_UNIT, sampling_steps
from minisora_jax.models.dit import DiTConfig, abstract_batch
from minisora_jax.models.quantized import FORMS, held_as, nbytes
from minisora_jax.parallel.mesh import (
    TOKENS,
    MeshConfig,
    batch_specs,
    make_mesh,
    require_divisible,
    with_shardings,
)
from minisora_jax.parallel.programs import memory_of
from minisora_jax.plan.hardware import Topology
from minisora_jax.plan.schedule import Traffic, read_traffic
from minisora_jax.training.diffusion_task import DiffusionTask, frozen_of, init_params, loss_of, optimizer_of
from minisora_jax.training.step import init_state, jit_train_step

IMAGE_TOKENS = 257  # of one image in Wan's image-to-video


@dataclasses.dataclass(frozen=True)
class Workload:
    """One step to plan."""

    task: DiffusionTask
    tokens: int  # of a clip
    clips: int = 1  # of a row
    rows: int = 1
    text_tokens: int = 512  # of a clip's caption
    sample: bool = False  # plan a step of Heun's sampler with guidance, which has each clip twice
    weights: str = "float32"  # the type in which a sampling step keeps the weights
    frames: int = 0  # latent frames of a clip; 0: unknown, so that each token may have a noise level of its own

    @property
    def segments(self) -> int:
        """Segments of a row."""
        return self.clips * (2 if self.sample else 1)

    @property
    def row_frames(self) -> int:
        """Latent frames of a row; 0: unknown."""
        return self.segments * self.frames

    def row_tokens(self, mesh: jax.sharding.Mesh | MeshConfig) -> int:
        """S: tokens of a row, padded so that each device has a multiple of 128 tokens."""
        sizes = mesh.shape if isinstance(mesh, jax.sharding.Mesh) else vars(mesh)
        unit = 128 * sizes["ring"] * sizes["ulysses"]
        return -(-self.segments * self.tokens // unit) * unit


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """The compiler's numbers about a step. Bytes are of one chip."""

    parameters: int
    seconds: float  # that compiling took on this machine
    state_bytes: dict[str, int]  # by kind: parameters, average, optimiser, batch
    temporary_bytes: int
    code_bytes: int
    traffic: list[Traffic]
    memory: float  # of a chip
    needed_bytes: int = 0  # the total by the compiler's error if it refuses the step; 0: it compiles

    @property
    def fits(self) -> bool:
        """Whether the step compiles, and all that it holds is within a chip's memory."""
        return not self.needed_bytes and self.total_bytes <= self.memory

    @property
    def total_bytes(self) -> int:
        """All memory of the step."""
        return self.needed_bytes or sum(self.state_bytes.values()) + self.temporary_bytes + self.code_bytes


def abstract_state(work: Workload, mesh: jax.sharding.Mesh) -> Any:
    """The TrainState of a run as `jax.ShapeDtypeStruct`s on the mesh."""
    optimizer = optimizer_of(work.task)
    init = lambda key: init_state(init_params(work.task, key), optimizer, work.task.run.optim.ema > 0)
    with jax.set_mesh(mesh):
        return with_shardings(jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0))), mesh)


def image_tokens(config: DiTConfig) -> int:
    """Tokens of a clip's given images, for a model that attends to them."""
    return config.image_positions or IMAGE_TOKENS


def state_bytes(task: DiffusionTask) -> dict[str, int]:
    """Bytes of a run's state on all chips together: parameters, average, optimiser and gradient."""
    dit = dataclasses.replace(task.dit, attention="reference", remat="none")  # neither changes the state
    return _state_bytes(dataclasses.replace(task, dit=dit))


@functools.cache
def _state_bytes(task: DiffusionTask) -> dict[str, int]:
    init = lambda key: init_state(init_params(task, key), optimizer_of(task), task.run.optim.ema > 0)
    state = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)))
    held = lambda tree: sum(map(nbytes, jax.tree.leaves(tree)))
    return {
        "parameters": held(state.params) + held(frozen_of(task).abstract()),
        "average": held(state.ema),
        "optimiser": held(state.opt_state),
        "gradient": held(state.params),
    }


def lower(work: Workload, mesh: jax.sharding.Mesh) -> tuple[dict[str, Any], jax.stages.Lowered]:
    """The step, lowered for a mesh.

    Returns:
        ({kind: abstract arrays on the chips}, the lowered step). Kinds are parameters, average, optimiser and batch.
    """
    require_divisible(mesh, rows=work.rows, heads=work.task.dit.heads)
    state, tokens = abstract_state(work, mesh), work.row_tokens(mesh)
    text, image = (work.segments * count for count in (work.text_tokens, image_tokens(work.task.dit)))
    batch = abstract_batch(work.task.dit, work.rows, tokens, text, image, slots=work.segments)
    batch = dataclasses.replace(batch, max_segment_len=work.tokens, frames=work.row_frames)
    lead = () if work.sample else (1,)  # a train step's batch has one microbatch
    if work.task.grpo.reward and not work.sample:  # or one for each trained step of a rollout
        scalar_BS: Any = jax.ShapeDtypeStruct((work.rows, tokens), jnp.float32)
        batch: Any = Rollout(batch, batch.tokens_BSP, batch.tokens_BSP, *[scalar_BS] * 4)
        lead = (work.task.grpo.trained,)
    on = lambda x, spec: jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype, sharding=NamedSharding(mesh, spec))
    batch = jax.tree.map(on, batch, batch_specs(batch, accumulated=not work.sample))
    if work.sample:
        time_BS: Any = on(jax.ShapeDtypeStruct((work.rows, tokens), jnp.float32), TOKENS)
        index_BS = on(jax.ShapeDtypeStruct((work.rows, tokens), jnp.int32), TOKENS)
        stored = lambda x: jax.ShapeDtypeStruct(x.shape, work.weights, sharding=x.sharding)
        if work.weights in FORMS:
            params = with_shardings(held_as(work.weights, state.params), mesh)
        else:
            params = jax.tree.map(stored, state.params)
        inputs = ((params,), batch, index_BS, index_BS, 3.0, (0.0, 1.0), None)
        static = (work.task.dit,), work.task.objective, GuidanceConfig().static
        times_KBS = jax.ShapeDtypeStruct(
            (STEPS_UNIT, *time_BS.shape), time_BS.dtype, sharding=NamedSharding(mesh, P(None, *TOKENS))
        )
        start = batch.tokens_BSP, SAMPLERS["heun"].begin(batch.tokens_BSP, time_BS), None
        with jax.set_mesh(mesh):
            nothing = None, 0.0, None, None  # no noise, no loop, nothing held
            lowered = sampling_steps.lower(static, "heun", start, 0, STEPS_UNIT, times_KBS, *nothing, inputs)
        return {"parameters": params, "batch": batch}, lowered
    optim = work.task.run.optim
    with jax.set_mesh(mesh):
        key = with_shardings(jax.eval_shape(lambda: jax.random.key(0)), mesh)
        frozen = frozen_of(work.task)
        fixed = with_shardings(frozen.abstract(), mesh)
        step = jit_train_step(loss_of(work.task), optimizer_of(work.task), optim, frozen.join)
        lowered = step.lower(state, batch, key, fixed)
    return {
        "parameters": {"trained": state.params, "frozen": fixed},
        "average": state.ema,
        "optimiser": state.opt_state,
        "batch": batch,
    }, lowered


def compile_for(
    work: Workload, mesh_config: MeshConfig, topology: Topology, options: dict | None = None
) -> CompiledStep:
    """Compile a step for a TPU topology. A step that does not fit is returned with `needed_bytes`.

    Args:
        work: The step.
        mesh_config: The mesh.
        topology: The chips.
        options: Compiler options.

    Raises:
        ImportError: libtpu is not installed.
    """
    mesh = make_mesh(mesh_config, topology.devices())
    return compile_lowered(*lower(work, mesh), mesh, topology, options)


def compile_lowered(
    kinds: dict[str, Any],
    lowered: jax.stages.Lowered,
    mesh: jax.sharding.Mesh,
    topology: Topology,
    options: dict | None = None,
) -> CompiledStep:
    """Compile a lowered step for the chips of its mesh, see `compile_for`.

    Args:
        kinds: {kind: abstract arrays on the chips}, with "parameters" among them.
        lowered: The step.
        mesh: The mesh.
        topology: The chips.
        options: Compiler options.
    """
    counts = {kind: bytes_held(tree) for kind, tree in kinds.items()}
    parameters = sum(x.size for x in jax.tree.leaves(kinds["parameters"]))
    begin = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if (needed := _needed_bytes(str(error), sum(counts.values()))) is None:
            raise
        return CompiledStep(parameters, time.perf_counter() - begin, counts, 0, 0, [], topology.chip.memory, needed)
    seconds = time.perf_counter() - begin
    memory = memory_of(compiled)
    traffic = read_traffic(compiled.as_text() or "", dict(mesh.shape))
    sizes = memory.temp_size_in_bytes, memory.generated_code_size_in_bytes
    return CompiledStep(parameters, seconds, counts, *sizes, traffic, topology.chip.memory)


def bytes_held(tree: Any) -> int:
    """Bytes that a tree of abstract arrays takes on one chip."""
    shards = lambda x: jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype)
    return sum(nbytes(shards(x)) for x in jax.tree.leaves(tree))


def _needed_bytes(message: str, state: int) -> int | None:
    """The bytes of HBM that a program needs, from the compiler's out-of-memory error; None for other errors.

    Args:
        message: The error. It names the sum, or what the program needs beside its arguments.
        state: Bytes of the arguments.
    """
    match = re.search(r"[Uu]sed ([\d.]+)([KMG]) of [\d.]+[KMG] hbm|HLO temporaries \(([\d.]+)([KMG])\)", message)
    if not match:
        return None
    total, unit, beside, its_unit = match.groups()
    size = int(float(total or beside) * {"K": 2**10, "M": 2**20, "G": 2**30}[unit or its_unit])
    return size if total else size + state
