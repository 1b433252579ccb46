"""A model as samplers see it: at (x_t, t) it names the data and the noise, or the velocity, whatever it predicts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from minisora_jax.diffusion.noise_path import PATHS, NoisePath, convert, solve


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """`model(x_BSP, time_BS)` gives its `prediction` along `path`. Each method is one call of it."""

    model: Callable[[jax.Array, jax.Array], jax.Array]
    path: NoisePath = PATHS["linear"]
    prediction: str = "velocity"

    def velocity(self, x_BSP: jax.Array, time_BS: jax.Array) -> jax.Array:
        p_BSP = self.model(x_BSP, time_BS)
        return convert(self.path, self.prediction, "velocity", p_BSP, x_BSP, time_BS[..., None])

    def clean_and_noise(self, x_BSP: jax.Array, time_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
        return solve(self.path, self.prediction, self.model(x_BSP, time_BS), x_BSP, time_BS[..., None])

    # ---- What solvers need of the path

    def fall(self, time_BS: jax.Array, next_BS: jax.Array) -> jax.Array:
        """(s'/a') / (s/a), (B, S, 1): by how much the noise level falls from t to t'; 0 where t' is clean."""
        of = self.path
        before_BS = jnp.maximum(of.sigma(time_BS), 1e-12) * of.alpha(next_BS)
        return (of.sigma(next_BS) * of.alpha(time_BS) / before_BS)[..., None]

    def log_snr(self, time_BS: jax.Array) -> jax.Array:
        """log(a / s), (B, S, 1). Where alpha is 0 it counts as 1e-6, as in diffusers' flow schedules."""
        of = self.path
        a_BS, s_BS = jnp.maximum(of.alpha(time_BS), 1e-6), jnp.maximum(of.sigma(time_BS), 1e-12)
        return (jnp.log(a_BS) - jnp.log(s_BS))[..., None]


def where_moving(time_BS: jax.Array, next_BS: jax.Array, moved: jax.Array, x: jax.Array) -> jax.Array:
    """`moved` for tokens whose time changes, x for the others."""
    return jnp.where((time_BS != next_BS)[..., None], moved, x)
