"""The transformer's forward pass, compiled for a pod from a published checkpoint's header (see compiled.py)."""

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
from minisora_jax.parallel.programs import memory_of
from minisora_jax.plan.compiled import bytes_held, image_tokens
from minisora_jax.plan.hardware import Topology
from minisora_jax.weights import dit
from minisora_jax.weights.checkpoint import Checkpoint
from minisora_jax.weights.rules import planned_params


@dataclasses.dataclass(frozen=True)
class CompiledForward:
    """The compiler's numbers about a forward pass."""

    parameters: int
    tokens: int  # of a row
    chips: int
    seconds: float  # that compiling took on this machine
    parameter_bytes: int  # on each chip
    temporary_bytes: int  # on each chip


def parameters_on(config: DiTConfig, mesh: jax.sharding.Mesh, checkpoint: Checkpoint | None = None) -> Any:
    """The transformer's parameters on the mesh as `jax.ShapeDtypeStruct`s, float32, sharded as in training.

    Args:
        config: The model.
        mesh: The mesh.
        checkpoint: A published checkpoint. If given, its header is checked against the model.
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
    """The forward pass of one row for each device, with one clip in each row.

    Args:
        config: The model.
        size_thw: Latent size of the clip.
        text_tokens: L.
        mesh: The mesh.
        checkpoint: See `parameters_on`.

    Returns:
        (`parameters_on` the mesh, the lowered forward pass).
    """
    rows, tokens, sharding = mesh.size, math.prod(size_thw) // math.prod(config.patch), NamedSharding(mesh, BATCH)
    batch = abstract_batch(config, rows, tokens, text_tokens, image_tokens(config), sharding)
    time_BS = jax.ShapeDtypeStruct((rows, tokens), jnp.float32, sharding=sharding)
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
    """Compile the pass of `lower_forward` for a TPU topology, such as "v5p:4x4x4".

    Arguments are those of `lower_forward`.
    """
    devices = Topology.parse(topology).devices()
    begin = time.perf_counter()
    params, lowered = lower_forward(config, size_thw, text_tokens, make_mesh(mesh, devices), checkpoint)
    memory = memory_of(lowered.compile())
    seconds = time.perf_counter() - begin
    return CompiledForward(
        parameters=sum(x.size for x in jax.tree.leaves(params)),
        tokens=math.prod(size_thw) // math.prod(config.patch),
        chips=len(devices),
        seconds=seconds,
        parameter_bytes=bytes_held(params),
        temporary_bytes=memory.temp_size_in_bytes,
    )
