"""The real train step, or sampling step, compiled for a TPU pod on any machine: `libtpu` holds the compiler.

Nothing is computed or allocated: state and batch are shapes with layouts on the topology's own mesh. What does not fit a
chip's memory fails as it would on the pod. A process that has compiled for a topology should do nothing else: start
it with JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from minisora_jax.diffusion.guidance import GuidanceConfig
from minisora_jax.diffusion.sampler import SamplerConfig
from minisora_jax.generate import sampling_step
from minisora_jax.models.dit import abstract_batch
from minisora_jax.parallel.mesh import TOKENS, MeshConfig, laid_out, layout, make_mesh
from minisora_jax.plan.hardware import Topology
from minisora_jax.plan.schedule import Traffic, read
from minisora_jax.train.diffusion_task import DiffusionTask, init_diffusion, loss_of
from minisora_jax.train.loop import compile_step
from minisora_jax.train.optim import make_optimizer
from minisora_jax.train.step import init_state

IMAGE_TOKENS = 257  # of the image encoder of Wan's image-to-video


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is to be run: rows of so many tokens, each holding `clips` clips of equal length."""

    task: DiffusionTask
    tokens: int
    rows: int = 1
    text_tokens: int = 512
    clips: int = 1
    sample: bool = False  # a sampling step with guidance in place of a train step: two rows for each


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler said. Bytes are of one chip."""

    parameters: int
    seconds: float  # of compiling, here
    state_bytes: dict[str, int]  # by kind: parameters, average, optimiser, batch
    temporary_bytes: int
    code_bytes: int
    traffic: list[Traffic]
    wanted_bytes: int = 0  # where it does not fit: what it would take in all

    @property
    def fits(self) -> bool:
        return not self.wanted_bytes

    @property
    def total_bytes(self) -> int:
        return self.wanted_bytes or sum(self.state_bytes.values()) + self.temporary_bytes + self.code_bytes


def abstract_state(work: Workload, mesh: jax.sharding.Mesh) -> Any:
    """The TrainState of a run as `jax.ShapeDtypeStruct`s on the mesh."""
    optimizer = make_optimizer(work.task.run.optim, work.task.run.steps)
    with jax.set_mesh(mesh):
        key = jax.eval_shape(lambda: jax.random.key(0))
        return laid_out(jax.eval_shape(lambda k: init_state(init_diffusion(work.task, k), optimizer), key), mesh)


def abstract_rows(work: Workload, mesh: jax.sharding.Mesh, *, lead: tuple[int, ...] = ()) -> Any:
    """A PackedBatch of the workload, (*lead, B, ...), on the mesh."""
    rows = work.rows * (2 if work.sample else 1)
    batch = abstract_batch(work.task.dit, rows, work.tokens, work.text_tokens, IMAGE_TOKENS, slots=work.clips)
    batch = batch.replace(longest=-(-work.tokens // work.clips))
    specs = layout(batch)
    on = lambda x, spec: jax.ShapeDtypeStruct(
        (*lead, *x.shape), x.dtype, sharding=NamedSharding(mesh, P(*(None for _ in lead), *spec))
    )
    return jax.tree.map(on, batch, specs)


def lower(work: Workload, mesh: jax.sharding.Mesh) -> tuple[dict[str, Any], jax.stages.Lowered]:
    """({kind of state: tree}, the lowered step)."""
    state = abstract_state(work, mesh)
    if work.sample:
        batch = abstract_rows(work, mesh)
        with jax.set_mesh(mesh):
            lowered = _lower_sampling(work, mesh, state.params, batch)
        return {"parameters": state.params, "batch": batch}, lowered
    batch = abstract_rows(work, mesh, lead=(1,))
    with jax.set_mesh(mesh):
        key = laid_out(jax.eval_shape(lambda: jax.random.key(0)), mesh)
        optim = work.task.run.optim
        step = compile_step(loss_of(work.task), make_optimizer(optim, work.task.run.steps), optim)
        lowered = step.lower(state, batch, key)
    kinds = {"parameters": state.params, "average": state.ema, "optimiser": state.opt_state, "batch": batch}
    return kinds, lowered


def _lower_sampling(work: Workload, mesh, params, batch):
    """Heun's step with guidance, the captioned rows first and their uncaptioned twins after them."""
    like = batch.tokens_BSP
    shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype, sharding=NamedSharding(mesh, TOKENS))
    time_BS = shape(*like.shape[:2])
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, P()))
    del scalar
    return sampling_step(work.task, SamplerConfig("heun"), GuidanceConfig()).lower(params, batch, like, time_BS, time_BS)


def compile_for(work: Workload, mesh_config: MeshConfig, topology: Topology, options: dict | None = None) -> Compiled:
    """Compile the workload's step for a TPU topology. What does not fit is returned with `wanted_bytes`."""
    mesh = make_mesh(mesh_config, topology.devices())
    kinds, lowered = lower(work, mesh)
    held = lambda tree: sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if jnp.issubdtype(x.dtype, jnp.number) or x.dtype == bool
    )
    counts = {kind: held(tree) for kind, tree in kinds.items()}
    parameters = sum(x.size for x in jax.tree.leaves(kinds["parameters"]))
    begin = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if (wanted := _wanted(str(error))) is None:
            raise
        return Compiled(parameters, time.perf_counter() - begin, counts, 0, 0, [], wanted)
    seconds = time.perf_counter() - begin
    memory = compiled.memory_analysis()
    traffic = read(compiled.as_text(), dict(mesh.shape))
    return Compiled(
        parameters, seconds, counts, memory.temp_size_in_bytes, memory.generated_code_size_in_bytes, traffic
    )


def _wanted(message: str) -> int | None:
    """The bytes that a program wanted, of the compiler's words that it does not fit; None if it says something else."""
    if "RESOURCE_EXHAUSTED" not in message and "ran out of memory" not in message.lower():
        return None
    match = re.search(r"[Uu]sed ([\d.]+)([KMG]) of", message)
    return int(float(match[1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[match[2]]) if match else 1
