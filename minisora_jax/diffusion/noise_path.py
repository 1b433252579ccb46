"""Noise paths from data to noise, and the algebra between the quantities that a model may predict.

    x_t = a(t) x + s(t) e,      e ~ N(0, I),      t = 0 clean ... t = 1 noise

Every prediction is p = c_x x + c_e e. Together with x_t there are two equations in x and e, so any prediction gives any
other:

    | a    s   | |x|   |x_t|          clean     (0: x)    c = (1, 0)
    |          | | | = |   |          noise     (e)       c = (0, 1)
    | c_x  c_e | |e|   | p |          velocity  (dx_t/dt) c = (a', s')
                                      v                   c = (-s, a) / sqrt(a^2 + s^2)

v is Salimans & Ho's (2022, arXiv:2202.00512) on paths with a^2 + s^2 = 1; the root extends it to the other paths. On
"ve", v is minus the network F of EDM for data of unit variance (Karras et al. 2022, arXiv:2206.00364, table 1):
x = c_skip x_t - c_out v with c_skip = 1 / (s^2 + 1) and c_out = s / sqrt(s^2 + 1). `model_input` has c_in and c_noise.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minisora_jax.parallel.mesh import lookup

SIGMA_MAX = 80.0  # EDM's largest sigma, for data of unit variance


@dataclasses.dataclass(frozen=True)
class NoisePath:
    """x_t = alpha(t) x + sigma(t) e. The functions take arrays of any shape."""

    alpha: Callable[[jax.Array], jax.Array]
    sigma: Callable[[jax.Array], jax.Array]
    time_of: Callable[[jax.Array], jax.Array]  # the time at which sigma / alpha has a given value
    explodes: bool = False  # whether the variance of x_t grows far beyond the data's
    told_before: float = 0.0  # the model is told the time minus this, at least 0

    def slopes(self, time: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The derivatives (a', s') by time. s' of "vp" and "cosine" is infinite at 0, so times are at least 1e-6."""
        time = jnp.maximum(time, 1e-6)
        one = jnp.ones_like(time)
        return jax.jvp(self.alpha, (time,), (one,))[1], jax.jvp(self.sigma, (time,), (one,))[1]

    def ratio(self, time: jax.Array) -> jax.Array:
        """sigma / alpha, EDM's noise level. It is infinite where alpha is 0."""
        return self.sigma(time) / self.alpha(time)

    def spread(self, time: jax.Array) -> jax.Array:
        """The standard deviation of x_t for data of unit variance, such as latents."""
        return jnp.sqrt(self.alpha(time) ** 2 + self.sigma(time) ** 2)

    def mix(self, x: jax.Array, noise: jax.Array, time: jax.Array) -> jax.Array:
        """x_t = alpha(t) x + sigma(t) noise. `time` broadcasts against x."""
        return self.alpha(time) * x + self.sigma(time) * noise

    def model_input(self, x_BSP: jax.Array, time_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The model's inputs for x_t and t.

        On an exploding path they are x_t at unit variance and t = s / (1 + s). On "ddpm" the model is told timestep k,
        that is t - 1/1000, as the authors of DiT, PixArt and Latte tell it; clean tokens have timestep 0 too.
        """
        if self.told_before:
            return x_BSP, jnp.maximum(time_BS - self.told_before, 0.0)
        if not self.explodes:
            return x_BSP, time_BS
        sigma_BS = self.sigma(time_BS)
        return x_BSP / self.spread(time_BS)[..., None], sigma_BS / (1.0 + sigma_BS)


# ---- Variance-preserving paths are given by log alpha; sigma = sqrt(1 - alpha^2)


def _preserving(log_alpha: Callable, time_of: Callable) -> NoisePath:
    sigma = lambda t: jnp.sqrt(-jnp.expm1(2.0 * log_alpha(t)))
    return NoisePath(lambda t: jnp.exp(log_alpha(t)), sigma, time_of)


BETA_MIN, BETA_MAX = 0.1, 20.0  # per unit of time: DDPM's 1e-4 ... 0.02 per step, times 1000 steps


def _vp_time(ratio):
    rise, log_alpha = BETA_MAX - BETA_MIN, 0.5 * jnp.log1p(jnp.square(ratio))
    return (jnp.sqrt(0.25 * BETA_MIN**2 + rise * log_alpha) - 0.5 * BETA_MIN) / (0.5 * rise)


COSINE_OFFSET = 0.008
_turn = 0.5 * math.pi / (1.0 + COSINE_OFFSET)  # alpha = cos(start + turn t) / cos(start)
_start = COSINE_OFFSET * _turn
_cosine_alpha = lambda t: jnp.cos(_start + _turn * t) / math.cos(_start)


def _cosine_sigma(t):
    """sqrt(1 - alpha^2), computed as cos^2 u - cos^2 v = sin(u + v) sin(v - u), which avoids cancellation."""
    return jnp.sqrt(jnp.sin(2.0 * _start + _turn * t) * jnp.sin(_turn * t)) / math.cos(_start)


def _cosine_time(ratio):
    return (jnp.arccos(math.cos(_start) / jnp.sqrt(1.0 + jnp.square(ratio))) - _start) / _turn


# ---- DDPM's table of 1000 steps. Timestep k (0 to 999) is t = (k + 1) / 1000. Between steps sigma / alpha is linear.

DDPM_STEPS = 1000


@functools.cache
def ddpm_ratios() -> np.ndarray:
    """sigma / alpha at t = 0, 1/1000, ... 1; float64 (1001,)."""
    alpha_squared = np.cumprod(1.0 - np.linspace(1e-4, 0.02, DDPM_STEPS))
    return np.concatenate([[0.0], np.sqrt((1.0 - alpha_squared) / alpha_squared)])


def _between(k: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """The table's entries at k and k + 1, sharded like k."""
    table = ddpm_ratios()
    pairs = lookup(jnp.asarray(np.stack([table[:-1], table[1:]], -1), dtype), k)
    return pairs[..., 0], pairs[..., 1]


def _ddpm_ratio(t):
    t = jnp.asarray(t) * DDPM_STEPS
    k = jnp.clip(jnp.floor(t).astype(jnp.int32), 0, DDPM_STEPS - 1)
    low, high = _between(k, t.dtype)
    return low + (high - low) * (t - k)


def _ddpm_time(ratio):
    ratio = jnp.asarray(ratio)
    k = jnp.zeros_like(ratio, jnp.int32)
    for bit in (512, 256, 128, 64, 32, 16, 8, 4, 2, 1):  # binary search for the last entry that is <= ratio
        above = jnp.minimum(k + bit, DDPM_STEPS - 1)
        k = jnp.where(_between(above, ratio.dtype)[0] <= ratio, above, k)
    low, high = _between(k, ratio.dtype)
    return (k + (ratio - low) / (high - low)) / DDPM_STEPS


PATHS = {
    # Rectified flow: Liu et al. 2022, arXiv:2209.03003; Lipman et al. 2022, arXiv:2210.02747
    "linear": NoisePath(lambda t: 1.0 - t, lambda t: t, lambda r: r / (1.0 + r)),
    # Trigonometric: Albergo & Vanden-Eijnden 2022, arXiv:2209.15571; SiT's GVP, arXiv:2401.08740
    "gvp": NoisePath(
        lambda t: jnp.cos(0.5 * math.pi * t),
        lambda t: jnp.sin(0.5 * math.pi * t),
        lambda r: jnp.arctan(r) / (0.5 * math.pi),
    ),
    # DDPM in continuous time: Song et al. 2020, arXiv:2011.13456, eq. 32
    "vp": _preserving(lambda t: -0.25 * t**2 * (BETA_MAX - BETA_MIN) - 0.5 * t * BETA_MIN, _vp_time),
    # DDPM as published, Ho et al. 2020, arXiv:2006.11239
    "ddpm": NoisePath(
        lambda t: jax.lax.rsqrt(1.0 + jnp.square(_ddpm_ratio(t))),
        lambda t: _ddpm_ratio(t) * jax.lax.rsqrt(1.0 + jnp.square(_ddpm_ratio(t))),
        _ddpm_time,
        told_before=1 / DDPM_STEPS,
    ),
    # Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17
    "cosine": NoisePath(_cosine_alpha, _cosine_sigma, _cosine_time),
    # EDM, with time proportional to sigma: Karras et al. 2022, arXiv:2206.00364
    "ve": NoisePath(jnp.ones_like, lambda t: SIGMA_MAX * t, lambda r: r / SIGMA_MAX, explodes=True),
}


def _v(path: NoisePath, time: jax.Array) -> tuple[jax.Array, jax.Array]:
    spread = path.spread(time)
    return -path.sigma(time) / spread, path.alpha(time) / spread


# (path, time) -> (c_x, c_e)
PREDICTIONS: dict[str, Callable[[NoisePath, jax.Array], tuple[jax.Array, jax.Array]]] = {
    "velocity": NoisePath.slopes,
    "noise": lambda path, time: (jnp.zeros_like(time), jnp.ones_like(time)),
    "clean": lambda path, time: (jnp.ones_like(time), jnp.zeros_like(time)),
    "v": _v,
}


def target(path: NoisePath, prediction: str, x: jax.Array, noise: jax.Array, time: jax.Array) -> jax.Array:
    """The prediction of a perfect model, p = c_x x + c_e e. `time` broadcasts against x."""
    c_x, c_e = PREDICTIONS[prediction](path, time)
    return c_x * x + c_e * noise


def determinant(path: NoisePath, prediction: str, time: jax.Array) -> jax.Array:
    """a c_e - s c_x. An error d of p is an error -s d / determinant of x and a d / determinant of e."""
    c_x, c_e = PREDICTIONS[prediction](path, time)
    return path.alpha(time) * c_e - path.sigma(time) * c_x


def solve(
    path: NoisePath, prediction: str, p: jax.Array, x_t: jax.Array, time: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The estimates (x, e) for a prediction p at x_t. `time` broadcasts against x_t.

    They are finite everywhere, because the determinant is kept at least 1e-6 from zero. Where x_t and p do not
    determine x (noise prediction at alpha = 0) or e (clean prediction at sigma = 0), that estimate is meaningless.
    """
    c_x, c_e = PREDICTIONS[prediction](path, time)
    a, s, det = path.alpha(time), path.sigma(time), determinant(path, prediction, time)
    det = jnp.where(jnp.abs(det) < 1e-6, jnp.copysign(1e-6, det), det)
    x = p if prediction == "clean" else (c_e * x_t - s * p) / det
    noise = p if prediction == "noise" else (a * p - c_x * x_t) / det
    return x, noise


def convert(path: NoisePath, source: str, result: str, p: jax.Array, x_t: jax.Array, time: jax.Array) -> jax.Array:
    """A prediction p of kind `source` at x_t, converted to the kind `result`."""
    if source == result:
        return p
    return target(path, result, *solve(path, source, p, x_t, time), time)
