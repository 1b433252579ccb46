"""Compile for a TPU pod without the pod: `libtpu` holds the real compiler and runs on any machine.

Nothing is computed or allocated: parameters and batch are shapes with shardings on the topology's own mesh. What does
not fit a chip's memory fails as it would on the pod. A process that has compiled for a topology should do nothing
else: start it with JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1.
"""

from __future__ import annotations

import dataclasses
import math
import time

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from minisora_jax.models.dit import DiT, DiTConfig, abstract_params
from minisora_jax.parallel.mesh import BATCH, MeshConfig, make_mesh
from minisora_jax.types import PackedBatch


@dataclasses.dataclass(frozen=True)
class Compiled:
    parameters: int
    tokens: int  # of one row
    chips: int
    seconds: float  # that the compiler took, here
    parameter_bytes: int  # on each chip
    temporary_bytes: int


def compile_forward(
    config: DiTConfig, size_thw: tuple[int, int, int], text_tokens: int, topology: str, mesh: MeshConfig
) -> Compiled:
    """The transformer's forward pass, one clip of size_thw latents in each row and a row on each chip.

    Parameters are held in float32, cut over the mesh's fsdp axis, as in training; the computation is bfloat16.
    """
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    on = make_mesh(mesh, devices)
    rows, slots = len(devices), 1
    tokens = math.prod(size_thw) // math.prod(config.patch)
    batch = PackedBatch(
        tokens_BSP=_abstract(on, rows, tokens, config.token_width),
        segment_BS=_abstract(on, rows, tokens, dtype=jnp.int32),
        position_BS3=_abstract(on, rows, tokens, 3, dtype=jnp.int32),
        known_BS=_abstract(on, rows, tokens, dtype=bool),
        text_BLE=_abstract(on, rows, text_tokens, config.text_features),
        text_segment_BL=_abstract(on, rows, text_tokens, dtype=jnp.int32),
        fps_BG=_abstract(on, rows, slots),
        size_BG3=_abstract(on, rows, slots, 3, dtype=jnp.int32),
        image_BIE=_abstract(on, rows, 257, config.image_features) if config.image_features else None,
        image_segment_BI=_abstract(on, rows, 257, dtype=jnp.int32) if config.image_features else None,
    )
    with jax.set_mesh(on):
        params = abstract_params(config)
        params = jax.tree.map(lambda x: _laid_out(x, on), params)
        begin = time.perf_counter()
        lowered = jax.jit(DiT(config).apply).lower(params, batch.tokens_BSP, _abstract(on, rows, tokens), batch)
        compiled = lowered.compile()
        seconds = time.perf_counter() - begin
    memory = compiled.memory_analysis()
    held = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(params))
    return Compiled(
        parameters=sum(x.size for x in jax.tree.leaves(params)),
        tokens=tokens,
        chips=len(devices),
        seconds=seconds,
        parameter_bytes=held,
        temporary_bytes=memory.temp_size_in_bytes,
    )


def _abstract(mesh, *shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, BATCH))


def _laid_out(x: jax.ShapeDtypeStruct, mesh) -> jax.ShapeDtypeStruct:
    """x with the layout its initialiser gave it, on the mesh's own devices."""
    spec = x.sharding.spec if x.sharding is not None else P()
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
