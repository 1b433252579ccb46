"""The transformer's forward pass alone, planned from a published checkpoint's header (compiled.py says how)."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from minisora_jax.models.dit import DiT, DiTConfig, abstract_batch, abstract_params
from minisora_jax.parallel.mesh import BATCH, MeshConfig, make_mesh, with_shardings
from minisora_jax.plan.compiled import IMAGE_TOKENS, bytes_held
from minisora_jax.plan.hardware import Topology
from minisora_jax.weights import dit
from minisora_jax.weights.checkpoint import Checkpoint
from minisora_jax.weights.rules import planned_params


@dataclasses.dataclass(frozen=True)
class CompiledForward:
    parameters: int
    tokens: int  # of one row
    chips: int
    seconds: float  # that the compiler took, here
    parameter_bytes: int  # on each chip
    temporary_bytes: int


def parameters_on(config: DiTConfig, mesh: jax.sharding.Mesh, checkpoint: Checkpoint | None = None) -> Any:
    """The transformer's parameters as `jax.ShapeDtypeStruct`s on the mesh, float32, cut over fsdp as in training.

    From the header of a published `checkpoint`, if one is given: what importing it onto this mesh would hold.
    """
    with jax.set_mesh(mesh):
        params = with_shardings(abstract_params(config), mesh)
    if checkpoint is None:
        return params
    return planned_params(checkpoint, dit.rules(config, dit.name_map_of(checkpoint.names)), params, ignored=dit.IGNORED)


def lower_forward(
    config: DiTConfig,
    size_thw: tuple[int, int, int],
    text_tokens: int,
    mesh: jax.sharding.Mesh,
    checkpoint: Checkpoint | None = None,
) -> tuple[Any, jax.stages.Lowered]:
    """(`parameters_on` the mesh, the forward pass that takes them): a row for each device, one clip in each."""
    rows, tokens, by_row = mesh.size, math.prod(size_thw) // math.prod(config.patch), NamedSharding(mesh, BATCH)
    batch = abstract_batch(config, rows, tokens, text_tokens, IMAGE_TOKENS, by_row)
    time_BS = jax.ShapeDtypeStruct((rows, tokens), jnp.float32, sharding=by_row)
    params = parameters_on(config, mesh, checkpoint)
    with jax.set_mesh(mesh):
        return params, jax.jit(DiT(config).apply).lower(params, batch.tokens_BSP, time_BS, batch)


def compile_forward(
    config: DiTConfig,
    size_thw: tuple[int, int, int],
    text_tokens: int,
    topology: str,
    mesh: MeshConfig,
    checkpoint: Checkpoint | None = None,
) -> CompiledForward:
    """The transformer's forward pass, one clip of size_thw latents in each row and a row on each chip.

    Parameters are `parameters_on` the topology's mesh; the computation is bfloat16.
    """
    devices = Topology.parse(topology).devices()
    begin = time.perf_counter()
    params, lowered = lower_forward(config, size_thw, text_tokens, make_mesh(mesh, devices), checkpoint)
    memory = lowered.compile().memory_analysis()
    seconds = time.perf_counter() - begin
    return CompiledForward(
        parameters=sum(x.size for x in jax.tree.leaves(params)),
        tokens=math.prod(size_thw) // math.prod(config.patch),
        chips=len(devices),
        seconds=seconds,
        parameter_bytes=bytes_held(params),
        temporary_bytes=memory.temp_size_in_bytes,
    )
