"""The path from data to noise: rectified flow (Liu et al. 2022, arXiv:2209.03003).

x_t = (1 - t) x + t e,    e ~ N(0, I),    t = 0 clean ... t = 1 noise
velocity  v = dx_t / dt = e - x          so   x = x_t - t v   and   e = x_t + (1 - t) v
"""

from __future__ import annotations

import jax


def interpolate(x: jax.Array, noise: jax.Array, time: jax.Array) -> jax.Array:
    """x_t; `time` broadcasts against x."""
    return (1.0 - time) * x + time * noise


def velocity(x: jax.Array, noise: jax.Array) -> jax.Array:
    return noise - x


def clean(x_t: jax.Array, v: jax.Array, time: jax.Array) -> jax.Array:
    """The data that a velocity at time t points to."""
    return x_t - time * v
