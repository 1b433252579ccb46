"""Which noise levels to train on, and which to sample at.

t = sigmoid(u),  u ~ N(mean, std)                      "logit-normal" (Esser et al. 2024, arXiv:2403.03206, eq. 19)
t ~ U(0, 1)                                            "uniform"
sigma / alpha at t = exp(u),  u ~ N(mean, std)         "edm" (Karras et al. 2022, arXiv:2206.00364: -1.2, 1.2)
t' = s t / (s t + 1 - t),      s = sqrt(n / n_base)      shift by token count (Esser et al., eq. 23): n tokens of one
                                                       clip carry more redundant signal, so need more noise

On the linear path, sigma / alpha = t / (1 - t), so that "edm" and "logit-normal" are the same there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from minisora_jax.diffusion.noise_path import DDPM_STEPS, PATHS, SIGMA_MAX, NoisePath
from minisora_jax.models.layers import per_token
from minisora_jax.types import PackedBatch

LINEAR = PATHS["linear"]

DISTRIBUTIONS = {  # a standard normal draw as a time
    "logit-normal": lambda u, z, path: jax.nn.sigmoid(u),
    "uniform": lambda u, z, path: jax.scipy.special.ndtr(z),
    "edm": lambda u, z, path: jnp.minimum(path.time_of(jnp.exp(u)), 1.0),
}


@dataclasses.dataclass(frozen=True)
class TimeConfig:
    mean: float = 0.0  # of the logit of time, or of the log of sigma / alpha; higher trains more on noisy levels
    std: float = 1.0
    base_tokens: int = 256  # clips of this many tokens are not shifted; 0 for no shift
    per_frame: float = 0.1  # share of clips whose frames have a level each (Diffusion Forcing)
    distribution: str = "logit-normal"  # "uniform" takes neither mean nor std

    def __post_init__(self):
        if self.distribution not in DISTRIBUTIONS:
            raise ValueError(f"times.distribution={self.distribution!r} must be one of {', '.join(DISTRIBUTIONS)}")
        if self.std < 0:
            raise ValueError(f"times.std={self.std} must not be negative")


def shift(time: jax.Array, tokens: jax.Array, base_tokens: int) -> jax.Array:
    """Time shifted for a clip of `tokens` tokens; maps 0 to 0 and 1 to 1."""
    if not base_tokens:
        return time
    s = jnp.sqrt(jnp.maximum(tokens, 1) / base_tokens)
    return s * time / (s * time + (1.0 - time))


def tokens_of_segment(batch: PackedBatch) -> jax.Array:
    """Number of tokens of each token's own clip, (B, S) float32; 0 for padding."""
    count_BG1 = jnp.prod(batch.size_BG3, axis=-1, keepdims=True).astype(jnp.float32)
    return per_token(count_BG1, batch.segment_BS)[..., 0]


def training_times(config: TimeConfig, batch: PackedBatch, key: jax.Array, path: NoisePath = LINEAR) -> jax.Array:
    """A time per token (B, S): one draw per clip, or per frame for some clips; 0 where known."""
    clip_key, frame_key, which_key = jax.random.split(key, 3)
    row_BS = jnp.zeros_like(batch.segment_BS) + jnp.arange(batch.segment_BS.shape[0])[:, None]
    clip = (row_BS, batch.segment_BS)
    of_clip = drawn_by(jax.random.normal, clip_key, *clip)
    of_frame = drawn_by(jax.random.normal, frame_key, *clip, batch.position_BS3[..., 0])
    per_frame = drawn_by(jax.random.uniform, which_key, *clip) < config.per_frame
    z = jnp.where(per_frame, of_frame, of_clip)
    time = DISTRIBUTIONS[config.distribution](config.mean + config.std * z, z, path)
    return token_times(config, time, batch)


def drawn_by(sample: Callable, key: jax.Array, *ids_BS: jax.Array) -> jax.Array:
    """A draw per token (B, S), the same for tokens of the same ids, wherever in the row and on the mesh they are."""

    def one(*ids):
        return sample(functools.reduce(jax.random.fold_in, ids, key))

    return jax.vmap(jax.vmap(one))(*ids_BS)


def token_times(config: TimeConfig, time: jax.Array, batch: PackedBatch) -> jax.Array:
    """Each token's own time from one before the shift (any shape that broadcasts with (B, S)); 0 where known."""
    return jnp.where(batch.cond_mask_BS, 0.0, shift(time, tokens_of_segment(batch), config.base_tokens))


# ---- Sampling


def karras_levels(steps: int, largest: float, smallest: float, rho: float = 7.0) -> np.ndarray:
    """sigma / alpha of each step, and 0 at the end: EDM's grid (Karras et al. 2022, eq. 5); (steps + 1,)."""
    ramp = np.linspace(largest ** (1 / rho), smallest ** (1 / rho), steps)
    return np.append(ramp**rho, 0.0)


def _levels_of(path: NoisePath) -> tuple[float, float]:
    """The largest and smallest sigma / alpha to sample at: EDM's, or those of the path where it ends earlier."""
    first, largest = (float(r) for r in path.ratio(jnp.array([1.0 / DDPM_STEPS, 1.0])))
    return largest if 0 < largest < 1e3 else SIGMA_MAX, 0.002 if path.explodes else max(0.002, first)


def _steps_of_ddpm(timesteps: np.ndarray) -> np.ndarray:
    return np.append((np.round(timesteps) + 1) / DDPM_STEPS, 0.0)


TIME_SCHEDULES = {  # (steps, path) -> times from the noisiest to 0, (steps + 1,), before the shift
    "even": lambda n, path: jnp.linspace(1.0, 0.0, n + 1),
    # Wan's (UniPC over flow sigmas in diffusers): the even one for a model whose lowest level is 1 / 1000
    "wan": lambda n, path: np.append(np.linspace(1.0, 1 / 1000, n + 1)[:-1], 0.0),
    "karras": lambda n, path: np.append(path.time_of(karras_levels(n, *_levels_of(path))[:-1]), 0.0),
    # Whole steps of DDPM, as diffusers' DDPM and DDIM (its DPM-Solver and UniPC differ in the first two): Lin et
    # al. 2023, arXiv:2305.08891, table 2
    "leading": lambda n, path: _steps_of_ddpm(np.arange(n)[::-1] * (DDPM_STEPS // n)),
    "linspace": lambda n, path: _steps_of_ddpm(np.linspace(DDPM_STEPS - 1, 0, n)),
    "trailing": lambda n, path: _steps_of_ddpm(np.arange(DDPM_STEPS, 0, -DDPM_STEPS / n)[:n] - 1),
}


def latest_time(path: NoisePath, prediction: str) -> float:
    """Where sampling starts. Noise predicted at alpha = 0 says nothing of the data: then at sigma / alpha = 80."""
    if prediction == "noise" and path.alpha(1.0) < 1e-3:
        return float(path.time_of(SIGMA_MAX))
    return 1.0


def sampling_times(
    config: TimeConfig,
    steps: int,
    batch: PackedBatch,
    path: NoisePath = LINEAR,
    time_schedule: str = "even",
    latest: float = 1.0,
    start_BS: jax.Array | float = 1.0,
) -> jax.Array:
    """Falling times for each token, (steps + 1, B, S), shifted as in training; 0 at the end, and wherever known.

    start_BS: the share of the way, in times before the shift, that each token has to go."""
    if time_schedule not in TIME_SCHEDULES:
        raise ValueError(f"time_schedule={time_schedule!r} must be one of {', '.join(TIME_SCHEDULES)}")
    times = jnp.asarray(TIME_SCHEDULES[time_schedule](steps, path), jnp.float32)[:, None, None] * start_BS
    return jnp.minimum(token_times(config, times, batch), latest)
