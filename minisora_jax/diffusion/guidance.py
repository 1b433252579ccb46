"""Guidance: away from what a worse model would make.

    p = p_worse + w (p_good - p_worse)                                   w = 1 is the good model itself

Classifier-free (Ho & Salimans 2022, arXiv:2207.12598): the worse model is the same one without the caption. Each
request is two segments of its row, with its caption and with the empty one. Both start from the same noise and take
the same guided step, so they stay equal and the second one is free of bookkeeping.
Autoguidance (Karras et al. 2024, arXiv:2406.02507): a smaller or less trained model, with the same caption.

At one x_t and t all predictions are affine in each other, so it makes no difference which of them is guided; the
model's own is. Rescaling is not affine and acts on the clean estimate, so it, too, is the same for all of them.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from minisora_jax.diffusion.noise_path import NoisePath, solve, target
from minisora_jax.models.layers import per_slot_mean, per_token
from minisora_jax.parallel.mesh import take_in_row

SCHEDULES = {  # w - 1 at a time, in units of its mean: weak at first, strong at the end (Wang et al. 2024,
    # arXiv:2404.13040, who find that it gives sharper and more varied pictures)
    "constant": lambda t: jnp.ones_like(t),
    "linear": lambda t: 2.0 * (1.0 - t),
    "cosine": lambda t: 1.0 + jnp.cos(jnp.pi * t),
}


@dataclasses.dataclass(frozen=True)
class GuidanceConfig:
    scale: float = 3.0  # w; 1 for none
    # Times in which to guide, both included; elsewhere w = 1 (Kynkaanniemi et al. 2024, arXiv:2404.07724). A noise
    # level sigma of that paper is t = sigma / (1 + sigma) on the linear path.
    interval: tuple[float, float] = (0.0, 1.0)
    # Share of the clean estimate brought back to the spread it has without guidance (Lin et al. 2023,
    # arXiv:2305.08891, section 3.4)
    rescale: float = 0.0
    schedule: str = "constant"  # how w goes over time, its mean being kept

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(f"guidance schedule={self.schedule!r} must be one of {', '.join(SCHEDULES)}")
        low, high = self.interval
        if not 0 <= low < high <= 1:
            raise ValueError(f"guidance interval {low}-{high} must be two rising times within 0 (clean) and 1 (noise)")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance rescale={self.rescale} must be in [0, 1]")

    @property
    def static(self) -> tuple[float, str]:
        """What a sampling step is compiled for."""
        return self.rescale, self.schedule


def twins(p_BSP: jax.Array, with_caption_BS: jax.Array, without_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(p with, p without) for each token of either segment.

    `with_caption_BS` and `without_BS` give, for each token, the index in its row of its twin in the segment with
    the caption and in that without.
    """
    return take_in_row(p_BSP, with_caption_BS), take_in_row(p_BSP, without_BS)


def guide(
    good_BSP: jax.Array,
    guide_BSP: jax.Array,
    time_BS: jax.Array,
    scale: jax.Array | float,
    interval: tuple[float, float] = (0.0, 1.0),
    schedule: str = "constant",
) -> jax.Array:
    """p_worse + w (p_good - p_worse) at times in the interval, p_good at others."""
    guided = (time_BS >= interval[0]) & (time_BS <= interval[1])
    w_BS1 = jnp.where(guided, 1.0 + (scale - 1.0) * SCHEDULES[schedule](time_BS), 1.0)[..., None]
    return guide_BSP + w_BS1 * (good_BSP - guide_BSP)


def rescale(
    path: NoisePath,
    prediction: str,
    guided_BSP: jax.Array,
    good_BSP: jax.Array,
    x_BSP: jax.Array,
    time_BS: jax.Array,
    segment_BS: jax.Array,
    slots: int,
    share: float,
) -> jax.Array:
    """The guided prediction whose clean estimate has, by `share`, the standard deviation per clip of the good model's.

    Tokens at time 0, of which a prediction says nothing, are left as they are; leave known ones out of `segment_BS`.
    """
    time = time_BS[..., None]
    clean = lambda p_BSP: solve(path, prediction, p_BSP, x_BSP, time)[0]
    guided_clean_BSP = clean(guided_BSP)
    ratio_BS1 = _spread(clean(good_BSP), segment_BS, slots) / _spread(guided_clean_BSP, segment_BS, slots)
    clean_BSP = guided_clean_BSP * (1.0 - share + share * ratio_BS1)
    noise_BSP = (x_BSP - path.alpha(time) * clean_BSP) / jnp.maximum(path.sigma(time), 1e-6)
    return jnp.where(time > 0, target(path, prediction, clean_BSP, noise_BSP, time), guided_BSP)


def _spread(x_BSP: jax.Array, segment_BS: jax.Array, slots: int) -> jax.Array:
    """Standard deviation over each token's own clip, (B, S, 1); 1e-6 where there is none."""
    mean_BG1 = per_slot_mean(x_BSP, segment_BS, slots).mean(-1, keepdims=True)
    away_BSP = x_BSP - per_token(mean_BG1, segment_BS)
    variance_BG1 = per_slot_mean(away_BSP**2, segment_BS, slots).mean(-1, keepdims=True)
    return jnp.sqrt(jnp.maximum(per_token(variance_BG1, segment_BS), 1e-12))
