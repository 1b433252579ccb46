"""A model as samplers see it: it gives velocity, or data and noise, at (x_t, t) whatever it was trained to predict."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from minisora_jax.diffusion.noise_path import PATHS, NoisePath, convert, solve


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A model with its noise path and the kind of its prediction."""

    model: Callable[[jax.Array, jax.Array], jax.Array]  # (x_BSP, time_BS) -> prediction_BSP
    path: NoisePath = PATHS["linear"]
    prediction: str = "velocity"
    # The model where it learned the variance of DDPM's steps: (prediction_BSP, variance_BSP), the second from -1 to 1.
    with_variance: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]] | None = None
    # (x_BSP, time_BS, next_BS) -> the mean velocity between these times, of a model that was trained to predict it.
    mean_velocity: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None = None

    def velocity(self, x_BSP: jax.Array, time_BS: jax.Array) -> jax.Array:
        """dx_t/dt (B, S, P). One model call."""
        p_BSP = self.model(x_BSP, time_BS)
        return convert(self.path, self.prediction, "velocity", p_BSP, x_BSP, time_BS[..., None])

    def clean_and_noise(self, x_BSP: jax.Array, time_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The estimates (clean_BSP, noise_BSP). One model call."""
        return solve(self.path, self.prediction, self.model(x_BSP, time_BS), x_BSP, time_BS[..., None])

    def sigma_alpha_decay(self, time_BS: jax.Array, next_BS: jax.Array) -> jax.Array:
        """r = (s'/a') / (s/a), (B, S, 1): the factor on sigma / alpha from t to t'. It is 0 where t' is clean."""
        path = self.path
        divisor_BS = jnp.maximum(path.sigma(time_BS), 1e-12) * path.alpha(next_BS)
        return (path.sigma(next_BS) * path.alpha(time_BS) / divisor_BS)[..., None]

    def log_snr(self, time_BS: jax.Array) -> jax.Array:
        """log(a / s), (B, S, 1). alpha is at least 1e-6, as in diffusers' flow schedules."""
        path = self.path
        a_BS, s_BS = jnp.maximum(path.alpha(time_BS), 1e-6), jnp.maximum(path.sigma(time_BS), 1e-12)
        return (jnp.log(a_BS) - jnp.log(s_BS))[..., None]


def where_moving(time_BS: jax.Array, next_BS: jax.Array, moved_BSP: jax.Array, x_BSP: jax.Array) -> jax.Array:
    """`moved_BSP` for tokens whose time changes, `x_BSP` for the others."""
    return jnp.where((time_BS != next_BS)[..., None], moved_BSP, x_BSP)
