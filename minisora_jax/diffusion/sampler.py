"""Samplers: from noise at time 1 to data at time 0 along dx/dt = v(x, t). One step each; the loop is the caller's.

Times are per token, so known tokens (time 0 before and after a step) do not move.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

Velocity = Callable[[jax.Array, jax.Array], jax.Array]  # (x_BSP, time_BS) -> v_BSP


def euler_step(velocity: Velocity, x_BSP: jax.Array, time_BS: jax.Array, next_BS: jax.Array) -> jax.Array:
    """First order, one model call: x + (t' - t) v(x, t)."""
    return x_BSP + (next_BS - time_BS)[..., None] * velocity(x_BSP, time_BS)


def heun_step(velocity: Velocity, x_BSP: jax.Array, time_BS: jax.Array, next_BS: jax.Array) -> jax.Array:
    """Second order, two model calls: the mean of the slopes at both ends of an Euler step (Heun 1900)."""
    step = (next_BS - time_BS)[..., None]
    v = velocity(x_BSP, time_BS)
    v_next = velocity(x_BSP + step * v, next_BS)
    return x_BSP + step * 0.5 * (v + v_next)


STEPS = {"euler": euler_step, "heun": heun_step}
