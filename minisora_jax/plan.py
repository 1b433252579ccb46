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

from minisora_jax.models.dit import DiT, DiTConfig, abstract_batch, abstract_params
from minisora_jax.parallel.mesh import BATCH, MeshConfig, laid_out, make_mesh

IMAGE_TOKENS = 257  # of the image encoder of Wan's image-to-video


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
    rows, tokens = len(devices), math.prod(size_thw) // math.prod(config.patch)
    by_row = NamedSharding(on, BATCH)
    batch = abstract_batch(config, rows, tokens, text_tokens, IMAGE_TOKENS, by_row)
    time_BS = jax.ShapeDtypeStruct((rows, tokens), jnp.float32, sharding=by_row)
    with jax.set_mesh(on):
        params = laid_out(abstract_params(config), on)
        begin = time.perf_counter()
        lowered = jax.jit(DiT(config).apply).lower(params, batch.tokens_BSP, time_BS, batch)
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
