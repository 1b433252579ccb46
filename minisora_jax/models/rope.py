"""Positions of tokens on a (t, y, x) grid: rotary embedding in three axes, and sinusoids.

Rotary embedding (Su et al. 2021, arXiv:2104.09864) turns pairs of a head's channels by angles proportional to
a coordinate. The head is divided among the axes as in Wan 2.1: y and x get 2 * (K // 6) channels each, t the rest.
Clips beyond the sizes of training take other frequencies, see rope_scaling.py.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from minisora_jax.models.rope_scaling import ROPE_BASE, UNSCALED, RopeScaling
from minisora_jax.types import PackedBatch


def axis_widths(head_width: int, axes: int) -> tuple[int, ...]:
    """Channels of a head for each of `axes` coordinates (1 or 3). They sum to `head_width`."""
    if axes == 1:
        return (head_width,)
    space = 2 * (head_width // 6)
    return (head_width - 2 * space, space, space)


def rope_angles(position_BSx: jax.Array, head_width: int, scaling: RopeScaling = UNSCALED) -> jax.Array:
    """Rotation angles (B, S, head_width / 2), float32, of coordinates (B, S, 1 or 3): (t) or (t, y, x)."""
    angles = []
    for axis, width in enumerate(axis_widths(head_width, position_BSx.shape[-1])):
        if scaling.scales(axis):
            frequency = jnp.asarray(scaling.frequencies(axis, width), jnp.float32)
        else:
            frequency = ROPE_BASE ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
        angles.append(position_BSx[..., axis, None].astype(jnp.float32) * frequency)
    return jnp.concatenate(angles, axis=-1)


def in_trained_grid(batch: PackedBatch, scaling: RopeScaling) -> PackedBatch:
    """The batch for what reads places and sizes as such: interpolated, so that none is beyond those of training.

    The first frame keeps its place, and of a picture the edges do, as in `grid_positions`.
    """
    if scaling.name == "none" or set(scaling.factors) == {1.0}:
        return batch
    factors, centre = jnp.array(scaling.factors, jnp.float32), jnp.array([0.0, 0.5, 0.5], jnp.float32)
    position_BS3 = (batch.position_BS3 + centre) / factors - centre
    return dataclasses.replace(batch, position_BS3=position_BS3, size_BG3=batch.size_BG3 / factors)


def rotate(x_BSNK: jax.Array, angles_BSk: jax.Array) -> jax.Array:
    """x with each pair of channels (2i, 2i + 1) rotated by angle i, in every head alike."""
    cos, sin = jnp.cos(angles_BSk)[:, :, None, :, None], jnp.sin(angles_BSk)[:, :, None, :, None]
    x = x_BSNK.astype(jnp.float32).reshape(*x_BSNK.shape[:-1], -1, 2)
    a, b = x[..., :1], x[..., 1:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x_BSNK.shape).astype(x_BSNK.dtype)


def sinusoids(value: jax.Array, width: int, max_period: float = 10_000.0) -> jax.Array:
    """Scalars (...) -> (..., width): cos and sin at width / 2 geometric frequencies from 1 to 1 / max_period."""
    frequency = jnp.exp(-jnp.log(max_period) * jnp.arange(width // 2, dtype=jnp.float32) / (width // 2))
    angles = value.astype(jnp.float32)[..., None] * frequency
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def fixed_positions(
    position_BS3: jax.Array, size_BS3: jax.Array, width: int, base_grid: int
) -> tuple[jax.Array, jax.Array]:
    """Fixed sinusoids of each token's place within its frame, and of its frame.

    The first half of the channels is for x and the second for y, sines before cosines, as in DiT. A frame's grid is
    stretched to `base_grid` x `base_grid`, as in PixArt. The frame number is not stretched, and images have zeros in
    its place, as in Latte.

    Args:
        position_BS3: (t, y, x) of each token.
        size_BS3: Size of the grid of each token's clip along (t, y, x).
        width: D.
        base_grid: Tokens along a side of the grid that the model was trained at.

    Returns:
        (within_BSD, frame_BSD), float32.
    """
    t, y, x = (position_BS3[..., i].astype(jnp.float32) for i in range(3))
    stretch = lambda index, n: index * base_grid / jnp.maximum(n, 1.0)
    y, x = stretch(y, size_BS3[..., 1]), stretch(x, size_BS3[..., 2])
    sines_first = lambda emb: jnp.concatenate(jnp.split(emb, 2, axis=-1)[::-1], axis=-1)
    within_BSD = jnp.concatenate(
        [sines_first(sinusoids(x, width // 2)), sines_first(sinusoids(y, width // 2))], axis=-1
    )
    return within_BSD, jnp.where(size_BS3[..., :1] > 1, sines_first(sinusoids(t, width)), 0.0)
