"""Positions of tokens on a (t, y, x) grid: rotary embedding in three axes, and sinusoids.

Rotary embedding (Su et al. 2021, arXiv:2104.09864) turns pairs of a head's channels by angles proportional to
a coordinate; the head is divided among the axes as in Wan 2.1: 2 * (K // 6) channels each for y and x, the rest for t.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def axis_widths(head_width: int, axes: int) -> tuple[int, ...]:
    """Channels of a head given to each coordinate axis; they sum to `head_width`."""
    if axes == 1:
        return (head_width,)
    space = 2 * (head_width // 6)
    return (head_width - 2 * space, space, space)


def rope_angles(position_BSA: jax.Array, head_width: int, theta: float = 10_000.0) -> jax.Array:
    """Integer coordinates (..., A axes) -> float32 rotation angles (..., head_width / 2)."""
    angles = []
    for axis, width in enumerate(axis_widths(head_width, position_BSA.shape[-1])):
        frequency = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
        angles.append(position_BSA[..., axis, None].astype(jnp.float32) * frequency)
    return jnp.concatenate(angles, axis=-1)


def rotate(x_BSNK: jax.Array, angles_BSk: jax.Array) -> jax.Array:
    """Rotate each adjacent pair of channels (2i, 2i + 1) by angle i, the same for every head."""
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
    """Sinusoids of each token's place in its frame and of its frame, both (B, S, width) float32.

    Half of the channels for x, then half for y, sines before cosines, as in DiT; the grid of a frame is stretched onto
    `base_grid` x `base_grid`, as in PixArt. The frame's number is not stretched, and an image has none, as in Latte.
    """
    t, y, x = (position_BS3[..., i].astype(jnp.float32) for i in range(3))
    stretch = lambda index, n: index * base_grid / jnp.maximum(n, 1.0)
    y, x = stretch(y, size_BS3[..., 1]), stretch(x, size_BS3[..., 2])
    swap = lambda emb: jnp.concatenate(jnp.split(emb, 2, axis=-1)[::-1], axis=-1)
    within = jnp.concatenate([swap(sinusoids(x, width // 2)), swap(sinusoids(y, width // 2))], axis=-1)
    return within, jnp.where(size_BS3[..., :1] > 1, swap(sinusoids(t, width)), 0.0)
