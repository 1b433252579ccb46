"""Which noise levels to train on, and which to sample at.

u ~ N(mean, std),  t = sigmoid(u)                      logit-normal (Esser et al. 2024, arXiv:2403.03206, eq. 19)
t' = s t / (s t + 1 - t),      s = sqrt(n / n_base)      shift by token count (same paper, eq. 23): n tokens of one
                                                       clip carry more redundant signal, so need more noise
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from minisora_jax.models.layers import fill_runs, per_token, run_starts
from minisora_jax.parallel.mesh import like
from minisora_jax.types import PackedBatch


@dataclasses.dataclass(frozen=True)
class TimeConfig:
    mean: float = 0.0  # of the logit of time; above 0 trains more on noisy levels
    std: float = 1.0
    base_tokens: int = 256  # clips of this many tokens are not shifted; 0 for no shift
    per_frame: float = 0.1  # share of clips whose frames have a level each (Diffusion Forcing)


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


def training_times(config: TimeConfig, batch: PackedBatch, key: jax.Array) -> jax.Array:
    """A time per token (B, S): one draw per clip, or per frame for some clips; 0 where known."""
    clip_key, frame_key, which_key = jax.random.split(key, 3)
    draw = lambda sample, key: like(sample(key, batch.segment_BS.shape), batch.segment_BS)
    clip_starts = run_starts(batch.segment_BS)
    frame_starts = run_starts(batch.segment_BS, batch.position_BS3[..., 0])
    of_clip = fill_runs(draw(jax.random.normal, clip_key), clip_starts)
    of_frame = fill_runs(draw(jax.random.normal, frame_key), frame_starts)
    per_frame = fill_runs(draw(jax.random.uniform, which_key), clip_starts) < config.per_frame
    logit = config.mean + config.std * jnp.where(per_frame, of_frame, of_clip)
    time = shift(jax.nn.sigmoid(logit), tokens_of_segment(batch), config.base_tokens)
    return jnp.where(batch.known_BS, 0.0, time)


def sampling_times(config: TimeConfig, steps: int, batch: PackedBatch) -> jax.Array:
    """Times from 1 to 0 for each token, (steps + 1, B, S), shifted as in training; 0 throughout where known."""
    even = jnp.linspace(1.0, 0.0, steps + 1)[:, None, None]
    times = shift(even, tokens_of_segment(batch)[None], config.base_tokens)
    return jnp.where(batch.known_BS[None], 0.0, times)
