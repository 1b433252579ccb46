"""Samplers of higher order with one model call a step: they use the clean estimates of earlier steps.

Both solve the flow exactly except for the change of the clean estimate D over the step, in l = log(a / s):

    x' = (s'/s) x + a' (1 - r) D,      r = (s'/a') / (s/a) = exp(-h),      h = l' - l

The first step has no earlier estimate, and the last one ends on clean data where h is infinite. Both are of first
order, as in diffusers (`lower_order_final`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from minisora_jax.diffusion.denoiser import Denoiser, where_moving


@struct.dataclass
class Past:
    """One earlier step. Before the first step, its time is the present time and its arrays are zeros."""

    time_BS: jax.Array
    x_BSP: jax.Array
    clean_BSP: jax.Array


def begin(count: int, x_BSP: jax.Array, time_BS: jax.Array) -> tuple[Past, ...]:
    """The memory of `count` steps before the first step."""
    return tuple(Past(time_BS, jnp.zeros_like(x_BSP), jnp.zeros_like(x_BSP)) for _ in range(count))


def dpmpp_2m(
    denoiser: Denoiser,
    x_BSP: jax.Array,
    time_BS: jax.Array,
    next_BS: jax.Array,
    past: tuple[Past, ...],
    noise_BSP: jax.Array | None = None,
    eta: jax.Array | float = 0.0,
) -> tuple[jax.Array, tuple[Past, ...]]:
    """DPM-Solver++(2M), second order: Lu et al. 2022, arXiv:2211.01095, algorithm 2, in diffusers' midpoint form.

    See sampler.py for the arguments.
    """
    clean_BSP, _ = denoiser.clean_and_noise(x_BSP, time_BS)
    moved_BSP = _extrapolated(denoiser, x_BSP, clean_BSP, time_BS, next_BS, past[0])
    return where_moving(time_BS, next_BS, moved_BSP, x_BSP), (Past(time_BS, x_BSP, clean_BSP),)


def unipc(
    denoiser: Denoiser,
    x_BSP: jax.Array,
    time_BS: jax.Array,
    next_BS: jax.Array,
    past: tuple[Past, ...],
    noise_BSP: jax.Array | None = None,
    eta: jax.Array | float = 0.0,
) -> tuple[jax.Array, tuple[Past, ...]]:
    """UniPC-2 with B(h) = exp(h) - 1, "bh2": Zhao et al. 2023, arXiv:2302.04867; Wan's sampler.

    The estimate at a predicted state first corrects that state (UniC), then predicts the next one (UniP). At this order
    UniP is the step of DPM-Solver++(2M). With even steps the corrector makes the sampler third order. See sampler.py
    for the arguments.
    """
    last, before = past
    clean_BSP, _ = denoiser.clean_and_noise(x_BSP, time_BS)
    corrected_BSP = _corrected(denoiser, clean_BSP, time_BS, last, before)
    x_BSP = jnp.where((last.time_BS > time_BS)[..., None], corrected_BSP, x_BSP)
    moved_BSP = _extrapolated(denoiser, x_BSP, clean_BSP, time_BS, next_BS, last)
    return where_moving(time_BS, next_BS, moved_BSP, x_BSP), (Past(time_BS, x_BSP, clean_BSP), last)


def _exact(
    denoiser: Denoiser, x_BSP: jax.Array, clean_BSP: jax.Array, time_BS: jax.Array, next_BS: jax.Array
) -> jax.Array:
    """The exact step for a clean estimate that stays constant over the step."""
    a_next, s_next = denoiser.path.alpha(next_BS)[..., None], denoiser.path.sigma(next_BS)[..., None]
    s = jnp.maximum(denoiser.path.sigma(time_BS), 1e-12)[..., None]
    return s_next / s * x_BSP + a_next * (1.0 - denoiser.sigma_alpha_decay(time_BS, next_BS)) * clean_BSP


def _extrapolated(
    denoiser: Denoiser, x_BSP: jax.Array, clean_BSP: jax.Array, time_BS: jax.Array, next_BS: jax.Array, last: Past
) -> jax.Array:
    """The step with the clean estimate at its middle, on the line in l through the last two estimates."""
    log_snr = denoiser.log_snr(time_BS)
    h, h_last = denoiser.log_snr(next_BS) - log_snr, log_snr - denoiser.log_snr(last.time_BS)
    second_order = (last.time_BS > time_BS) & (next_BS > 0)
    change = jnp.where(second_order[..., None], 0.5 * h / h_last * (clean_BSP - last.clean_BSP), 0.0)
    return _exact(denoiser, x_BSP, clean_BSP + change, time_BS, next_BS)


def _corrected(denoiser: Denoiser, clean_BSP: jax.Array, time_BS: jax.Array, last: Past, before: Past) -> jax.Array:
    """The step from `last` to the present again, with the present estimate. Exact for an estimate quadratic in l."""
    log_snr_last = denoiser.log_snr(last.time_BS)
    h = denoiser.log_snr(time_BS) - log_snr_last
    r1 = (denoiser.log_snr(before.time_BS) - log_snr_last) / h  # negative: place of `before`, in steps from `last`
    phi1 = jnp.expm1(-h)
    phi2 = phi1 / -h - 1.0
    b1, b2 = phi2 / phi1, 2.0 * (phi2 / -h - 0.5) / phi1
    second_order = (before.time_BS > last.time_BS)[..., None]
    rho_before = jnp.where(second_order, (b1 - b2) / (1.0 - r1), 0.0)
    rho_now = jnp.where(second_order, b1 - rho_before, 0.5)
    change = jnp.where(second_order, rho_before / r1 * (before.clean_BSP - last.clean_BSP), 0.0)
    change = change + rho_now * (clean_BSP - last.clean_BSP)
    return _exact(denoiser, last.x_BSP, last.clean_BSP + change, last.time_BS, time_BS)
