"""Samplers of higher order at one model call a step: they remember the estimates of earlier steps.

Both solve the flow exactly but for the change of the clean estimate D over the step, in l = log(a / s):

    x' = (s'/s) x + a' (1 - r) D,      r = (s'/a') / (s/a) = exp(-h),      h = l' - l

The first step, with nothing to remember, and the last, onto clean data where h is infinite, are of first order, as in
diffusers (`lower_order_final`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from minisora_jax.diffusion.denoiser import Denoiser, where_moving


@struct.dataclass
class Past:
    """An earlier step: its time, state and clean estimate. Equal to the present time where there was none."""

    time_BS: jax.Array
    x_BSP: jax.Array
    clean_BSP: jax.Array


def begin(count: int, x_BSP: jax.Array, time_BS: jax.Array) -> tuple[Past, ...]:
    """The memory of `count` steps before the first."""
    return tuple(Past(time_BS, jnp.zeros_like(x_BSP), jnp.zeros_like(x_BSP)) for _ in range(count))


def dpmpp_2m(denoiser: Denoiser, x_BSP, time_BS, next_BS, past, noise_BSP=None, eta=None):
    """DPM-Solver++(2M), of second order: Lu et al. 2022, arXiv:2211.01095, algorithm 2, in diffusers' midpoint form."""
    clean_BSP, _ = denoiser.clean_and_noise(x_BSP, time_BS)
    moved = _extrapolated(denoiser, x_BSP, clean_BSP, time_BS, next_BS, past[0])
    return where_moving(time_BS, next_BS, moved, x_BSP), (Past(time_BS, x_BSP, clean_BSP),)


def unipc(denoiser: Denoiser, x_BSP, time_BS, next_BS, past, noise_BSP=None, eta=None):
    """UniPC-2 with B(h) = exp(h) - 1, "bh2": Zhao et al. 2023, arXiv:2302.04867; Wan's sampler.

    The estimate made at a predicted state first corrects that state (UniC), then predicts the next one (UniP), which
    at this order is the step of DPM-Solver++(2M). The corrector makes it of third order while steps are even.
    """
    clean_BSP, _ = denoiser.clean_and_noise(x_BSP, time_BS)
    corrected = _corrected(denoiser, clean_BSP, time_BS, *past)
    x_BSP = jnp.where((past[0].time_BS > time_BS)[..., None], corrected, x_BSP)
    moved = _extrapolated(denoiser, x_BSP, clean_BSP, time_BS, next_BS, past[0])
    return where_moving(time_BS, next_BS, moved, x_BSP), (Past(time_BS, x_BSP, clean_BSP), past[0])


def _exact(denoiser: Denoiser, x_BSP, clean_BSP, time_BS, next_BS):
    """The step if the clean estimate stayed as it is."""
    a_next, s_next = denoiser.path.alpha(next_BS)[..., None], denoiser.path.sigma(next_BS)[..., None]
    s = jnp.maximum(denoiser.path.sigma(time_BS), 1e-12)[..., None]
    return s_next / s * x_BSP + a_next * (1.0 - denoiser.fall(time_BS, next_BS)) * clean_BSP


def _extrapolated(denoiser: Denoiser, x_BSP, clean_BSP, time_BS, next_BS, before: Past):
    """The clean estimate, linear in l through the last two, taken at the middle of the step."""
    now = denoiser.log_snr(time_BS)
    h, h_before = denoiser.log_snr(next_BS) - now, now - denoiser.log_snr(before.time_BS)
    second = (before.time_BS > time_BS) & (next_BS > 0)
    change = jnp.where(second[..., None], 0.5 * h / h_before * (clean_BSP - before.clean_BSP), 0.0)
    return _exact(denoiser, x_BSP, clean_BSP + change, time_BS, next_BS)


def _corrected(denoiser: Denoiser, clean_BSP, time_BS, last: Past, before: Past):
    """The step from `last` to now again, with the estimate made here: exact for one quadratic in l."""
    at_last = denoiser.log_snr(last.time_BS)
    h = denoiser.log_snr(time_BS) - at_last
    r1 = (denoiser.log_snr(before.time_BS) - at_last) / h  # negative: where `before` lies, in steps
    phi1 = jnp.expm1(-h)
    phi2 = phi1 / -h - 1.0
    b1, b2 = phi2 / phi1, 2.0 * (phi2 / -h - 0.5) / phi1
    second = (before.time_BS > last.time_BS)[..., None]
    rho_before = jnp.where(second, (b1 - b2) / (1.0 - r1), 0.0)
    rho_here = jnp.where(second, b1 - rho_before, 0.5)
    change = jnp.where(second, rho_before / r1 * (before.clean_BSP - last.clean_BSP), 0.0)
    change = change + rho_here * (clean_BSP - last.clean_BSP)
    return _exact(denoiser, last.x_BSP, last.clean_BSP + change, last.time_BS, time_BS)
