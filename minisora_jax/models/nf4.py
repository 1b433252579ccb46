"""NF4, the weights of 4 bits of QLoRA (Dettmers et al. 2023, arXiv:2305.14314, section 3 and appendix E).

A weight is one of 16 levels times the scale of its block of 64. The levels are quantiles of the normal distribution.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from minisora_jax.parallel.mesh import shard

BLOCK = 64
LEVELS = (
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip


def block_of(size: int) -> int:
    """The length of blocks along an axis of this size: 64, or the largest of its divisors that divide the axis."""
    return math.gcd(size, BLOCK)


def encode(w: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """(codes of w's shape, uint4; the scales of blocks along `axis`, float32), sharded as w."""
    blocks = _in_blocks(w.astype(jnp.float32), axis, w.shape[axis] // block_of(w.shape[axis]))
    scale = jnp.max(jnp.abs(blocks), axis=axis + 1)
    parts = blocks / jnp.expand_dims(jnp.where(scale == 0, 1.0, scale), axis + 1)
    between = [(a + b) / 2 for a, b in zip(LEVELS, LEVELS[1:])]
    codes: Any = sum((parts > x).astype(jnp.uint8) for x in between)
    return _joined(codes, axis, w).astype(jnp.uint4), scale


def decode(codes: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
    """The weights that codes and scales stand for, sharded as the codes. Blocks lie along the axis that differs."""
    differ = [i for i, (a, b) in enumerate(zip(codes.shape, scale.shape)) if a != b]
    axis = differ[0] if differ else 0
    # Compared with each level, which takes no memory beside a matmul; a lookup is slow on a TPU.
    levels: Any = sum(jnp.where(codes == code, level, 0.0) for code, level in enumerate(LEVELS) if level)
    blocks = _in_blocks(levels, axis, scale.shape[axis])
    return _joined(blocks * jnp.expand_dims(scale, axis + 1), axis, codes).astype(dtype)


def scale_spec(spec: P, axis: int, blocks: int) -> P:
    """The sharding of scales beside that of their kernel: the blocks' axis is whole where blocks would be cut."""
    mesh, whole = jax.sharding.get_abstract_mesh(), [*spec]
    if axis < len(whole) and whole[axis] is not None:
        names = whole[axis] if isinstance(whole[axis], tuple) else (whole[axis],)
        if blocks % math.prod(mesh.shape[name] for name in names):
            whole[axis] = None
    return P(*whole)


def _in_blocks(x: jax.Array, axis: int, blocks: int) -> jax.Array:
    """x with its axis as (blocks, weights of a block)."""
    shape = (*x.shape[:axis], blocks, -1, *x.shape[axis + 1 :])
    if jax.sharding.get_abstract_mesh().empty:
        return x.reshape(shape)
    spec = scale_spec(jax.typeof(x).sharding.spec, axis, blocks)
    return jnp.reshape(shard(x, spec), shape, out_sharding=P(*spec[: axis + 1], None, *spec[axis + 1 :]))


def _joined(blocks: jax.Array, axis: int, like: jax.Array) -> jax.Array:
    """The inverse of `_in_blocks`, sharded as `like`."""
    if jax.sharding.get_abstract_mesh().empty:
        return blocks.reshape(like.shape)
    spec = jax.typeof(blocks).sharding.spec
    joined = jnp.reshape(blocks, like.shape, out_sharding=P(*spec[: axis + 1], *spec[axis + 2 :]))
    return shard(joined, jax.typeof(like).sharding.spec)
