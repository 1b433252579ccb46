"""The times to train on and to sample at.

    t = sigmoid(u),  u ~ N(mean, std)                "logit-normal" (Esser et al. 2024, arXiv:2403.03206, eq. 19)
    t ~ U(0, 1)                                      "uniform"
    t = (k + 1) / 1000,  k ~ U{0, ..., 999}          "timesteps" (Ho et al. 2020, arXiv:2006.11239)
    sigma / alpha at t = exp(u),  u ~ N(mean, std)   "edm" (Karras et al. 2022, arXiv:2206.00364: -1.2, 1.2)

    t' = s t / (s t + 1 - t),   s = sqrt(n / n_base)   shift by token count (Esser et al., eq. 23): a clip of more
                                                       tokens n carries more redundant signal, so it needs more noise

On the linear path sigma / alpha = t / (1 - t), so "edm" and "logit-normal" are the same there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from minisora_jax.diffusion.noise_path import DDPM_STEPS, PATHS, SIGMA_MAX, NoisePath
from minisora_jax.models.attention_ids import is_causal
from minisora_jax.models.layers import per_token
from minisora_jax.types import PackedBatch

LINEAR = PATHS["linear"]
MOST_PAST_TIME = 0.2  # of frames that causal training shows as the past; what is streamed may have errors of this size
MOST_SHIFT = 1000.0  # Wan's is 5

# (mean + std z, z, path) -> time, for a standard normal z
DISTRIBUTIONS: dict[str, Callable[[jax.Array, jax.Array, NoisePath], jax.Array]] = {
    "logit-normal": lambda u, z, path: jax.nn.sigmoid(u),
    "uniform": lambda u, z, path: jax.scipy.special.ndtr(z),
    "edm": lambda u, z, path: jnp.minimum(path.time_of(jnp.exp(u)), 1.0),
    "timesteps": lambda u, z, path: jnp.maximum(jnp.ceil(DDPM_STEPS * jax.scipy.special.ndtr(z)), 1.0) / DDPM_STEPS,
}

# (time, mean, std, path) -> the z of that time
_NORMAL_OF: dict[str, Callable[[float, float, float, NoisePath], jax.Array]] = {
    "logit-normal": lambda t, mean, std, path: (jax.scipy.special.logit(t) - mean) / std,
    "uniform": lambda t, mean, std, path: jax.scipy.special.ndtri(t),
    "edm": lambda t, mean, std, path: (jnp.log(path.ratio(jnp.float32(t))) - mean) / std,
    "timesteps": lambda t, mean, std, path: jax.scipy.special.ndtri(t),
}


@dataclasses.dataclass(frozen=True)
class TimeConfig:
    """The distribution of training times, and the shift of the times to sample at.

    Raises:
        ValueError: The distribution is unknown, or a number is out of range.
    """

    mean: float = 0.0  # of logit(t), or of log(sigma / alpha) with "edm"; higher values train more on noisy times
    std: float = 1.0  # of the logit of the time; of log sigma in "edm"
    base_tokens: int = 256  # n_base: clips of this many tokens are not shifted; 0: no shift
    causal: float = 0.0  # share of clips that are trained with attention in the order of frames, for streaming; such
    # clips have a time for each frame. With dit.causal it is all clips
    per_frame: float = 0.1  # share of clips with a time for each frame (Diffusion Forcing: arXiv:2407.01392)
    distribution: str = "logit-normal"  # a key of DISTRIBUTIONS; "uniform" and "timesteps" ignore mean and std
    sampling_shift: float = 1.0  # the shift s of sampling only, beside that by token count; 1: none (Wan: 5)
    low: float = 0.0  # times are drawn from here on, before the shift: the range of an expert (Wan 2.2 A14B)
    high: float = 1.0  # and up to here

    def __post_init__(self) -> None:
        if self.distribution not in DISTRIBUTIONS:
            raise ValueError(f"times.distribution={self.distribution!r} must be one of {', '.join(DISTRIBUTIONS)}")
        if self.std < 0:
            raise ValueError(f"times.std={self.std} must not be negative")
        if not 0 <= self.low < self.high <= 1 or (self.in_part and not self.std):
            raise ValueError(f"times.low={self.low} and times.high={self.high} must rise within 0 to 1, with a spread")
        if not 1 / MOST_SHIFT <= self.sampling_shift <= MOST_SHIFT:
            least, most = f"{1 / MOST_SHIFT:g}", f"{MOST_SHIFT:g}"
            raise ValueError(f"the sampling shift {self.sampling_shift} must be from {least} to {most} (1: no shift)")

    @property
    def in_part(self) -> bool:
        """Whether only a part of the times is drawn."""
        return (self.low, self.high) != (0.0, 1.0)


def shift(time: jax.Array, tokens: jax.Array, base_tokens: int) -> jax.Array:
    """Time shifted for a clip of `tokens` tokens. 0 and 1 stay as they are, and `base_tokens` = 0 shifts nothing."""
    if not base_tokens:
        return time
    return shift_by(jnp.sqrt(jnp.maximum(tokens, 1) / base_tokens), time)


def shift_by(s: jax.Array | float, time: jax.Array) -> jax.Array:
    """s t / (s t + 1 - t): more noise for s above 1."""
    return s * time / (s * time + (1.0 - time))


def tokens_of_segment(batch: PackedBatch) -> jax.Array:
    """The number of tokens that share a time, (B, S) float32: of the clip or, if causal, a frame; 0 for padding."""
    size_BG3 = batch.size_BG3
    if batch.causal_BG is not None:
        of_frame = batch.causal_BG[..., None] & (jnp.arange(3) == 0)
        size_BG3 = jnp.where(of_frame, jnp.minimum(size_BG3, 1), size_BG3)
    count_BG1 = jnp.prod(size_BG3, axis=-1, keepdims=True).astype(jnp.float32)
    return per_token(count_BG1, batch.segment_BS)[..., 0]


def training_times(config: TimeConfig, batch: PackedBatch, key: jax.Array, path: NoisePath = LINEAR) -> jax.Array:
    """Draw a time for each clip, or for each frame of some clips.

    Args:
        config: The distribution.
        batch: Packed clips.
        key: For the draws.
        path: Noise path, which "edm" depends on.

    Returns:
        The time of each token (B, S), after the shift; 0 for tokens that are given.
    """
    clip_key, frame_key, which_key = jax.random.split(key, 3)
    row_BS = jnp.zeros_like(batch.segment_BS) + jnp.arange(batch.segment_BS.shape[0])[:, None]
    clip = (row_BS, batch.segment_BS)
    clip_z_BS = draw_by_ids(jax.random.normal, clip_key, *clip)
    frame_z_BS = draw_by_ids(jax.random.normal, frame_key, *clip, batch.position_BS3[..., 0])
    causal_BS = is_causal(batch)
    per_frame_BS = (draw_by_ids(jax.random.uniform, which_key, *clip) < config.per_frame) | causal_BS
    z_BS = jnp.where(per_frame_BS, frame_z_BS, clip_z_BS)
    if config.in_part:
        z_BS = _within(config, z_BS, path)
    time_BS = DISTRIBUTIONS[config.distribution](config.mean + config.std * z_BS, z_BS, path)
    if batch.causal_BG is not None:
        time_BS = jnp.where(causal_BS, _with_past(time_BS, batch, clip, key), time_BS)
    return token_times(config, time_BS, batch)


def _with_past(time_BS: jax.Array, batch: PackedBatch, clip: tuple[jax.Array, ...], key: jax.Array) -> jax.Array:
    """Times of which a share has MOST_PAST_TIME at most, as the past has in streaming. Each clip draws its share."""
    keys = [jax.random.fold_in(key, i) for i in range(3)]
    share_BS = draw_by_ids(jax.random.uniform, keys[0], *clip)
    of_frame = lambda key: draw_by_ids(jax.random.uniform, key, *clip, batch.position_BS3[..., 0])
    return jnp.where(of_frame(keys[1]) < share_BS, MOST_PAST_TIME * of_frame(keys[2]), time_BS)


def _within(config: TimeConfig, z: jax.Array, path: NoisePath) -> jax.Array:
    """Standard normal z as draws of the same distribution within the times from `low` to `high`."""
    share_at = lambda time: jax.scipy.special.ndtr(_NORMAL_OF[config.distribution](time, config.mean, config.std, path))
    below, until = share_at(config.low) if config.low > 0 else 0.0, share_at(config.high) if config.high < 1 else 1.0
    share = below + (until - below) * jax.scipy.special.ndtr(z)
    return jax.scipy.special.ndtri(jnp.clip(share, 1e-7, 1.0 - 1e-7))


def draw_by_ids(sample: Callable[[jax.Array], jax.Array], key: jax.Array, *ids_BS: jax.Array) -> jax.Array:
    """A draw for each token (B, S). Tokens with the same ids get the same number, on any mesh."""

    def one(*ids: jax.Array) -> jax.Array:
        return sample(functools.reduce(jax.random.fold_in, ids, key))

    return jax.vmap(jax.vmap(one))(*ids_BS)


def token_times(config: TimeConfig, time: jax.Array, batch: PackedBatch) -> jax.Array:
    """The shifted time of each token, 0 for tokens that are given. `time` is unshifted and broadcasts with (B, S)."""
    return jnp.where(batch.cond_mask_BS, 0.0, shift(time, tokens_of_segment(batch), config.base_tokens))


# ---- Sampling


def sampling_token_times(config: TimeConfig, time: jax.Array, batch: PackedBatch) -> jax.Array:
    """`token_times` with the shift of sampling."""
    if config.sampling_shift != 1:
        time = shift_by(config.sampling_shift, time)
    return token_times(config, time, batch)


def karras_levels(steps: int, largest: float, smallest: float, rho: float = 7.0) -> np.ndarray:
    """sigma / alpha of each step, with 0 at the end, (steps + 1,): EDM's schedule (Karras et al. 2022, eq. 5)."""
    ramp = np.linspace(largest ** (1 / rho), smallest ** (1 / rho), steps)
    return np.append(ramp**rho, 0.0)


def _ratio_range(path: NoisePath) -> tuple[float, float]:
    """(largest, smallest) sigma / alpha to sample at: EDM's, or the path's own where its range is smaller."""
    first, largest = (float(r) for r in path.ratio(jnp.array([1.0 / DDPM_STEPS, 1.0])))
    return largest if 0 < largest < 1e3 else SIGMA_MAX, 0.002 if path.explodes else max(0.002, first)


def _ddpm_times(timesteps: np.ndarray) -> np.ndarray:
    """Times of DDPM's timesteps 0 to 999, with 0 at the end."""
    return np.append((np.round(timesteps) + 1) / DDPM_STEPS, 0.0)


# (steps, path) -> times from the noisiest to 0, (steps + 1,), before the shift
TIME_SCHEDULES: dict[str, Callable[[int, NoisePath], jax.Array | np.ndarray]] = {
    "even": lambda n, path: jnp.linspace(1.0, 0.0, n + 1),
    # That of Wan's authors: even from the highest sigma of their table, 0.999 in float32, to 0
    "wan": lambda n, path: np.linspace(np.float64(np.float32(0.999)), 0.0, n + 1),
    "karras": lambda n, path: np.append(path.time_of(jnp.asarray(karras_levels(n, *_ratio_range(path))[:-1])), 0.0),
    # Whole timesteps of DDPM (Lin et al. 2023, arXiv:2305.08891, table 2), as in diffusers' DDPM and DDIM. Its
    # DPM-Solver and UniPC differ in the first two.
    "leading": lambda n, path: _ddpm_times(np.arange(n)[::-1] * (DDPM_STEPS // n)),
    "linspace": lambda n, path: _ddpm_times(np.linspace(DDPM_STEPS - 1, 0, n)),
    "trailing": lambda n, path: _ddpm_times(np.arange(DDPM_STEPS, 0, -DDPM_STEPS / n)[:n] - 1),
}


def latest_time(path: NoisePath, prediction: str) -> float:
    """The time at which sampling starts: 1, or the time of sigma / alpha = 80.

    The second is for noise prediction on a path with alpha = 0 at time 1, where the prediction does not determine the
    data.
    """
    if prediction == "noise" and path.alpha(jnp.float32(1.0)) < 1e-3:
        return float(path.time_of(jnp.float32(SIGMA_MAX)))
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
    """The falling times of each token, (steps + 1, B, S), shifted as in training and by `config.sampling_shift`.

    The last time is 0. Tokens that are given have time 0 at all steps.

    Args:
        config: The shifts.
        steps: Number of steps.
        batch: Packed clips.
        path: Noise path.
        time_schedule: A key of TIME_SCHEDULES.
        latest: The largest time, see `latest_time`.
        start_BS: Unshifted time at which each token starts, for video-to-video; 1: pure noise.

    Raises:
        ValueError: The schedule is unknown.
    """
    if time_schedule not in TIME_SCHEDULES:
        raise ValueError(f"time_schedule={time_schedule!r} must be one of {', '.join(TIME_SCHEDULES)}")
    times = jnp.asarray(TIME_SCHEDULES[time_schedule](steps, path), jnp.float32)[:, None, None] * start_BS
    return jnp.minimum(sampling_token_times(config, times, batch), latest)
