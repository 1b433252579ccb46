"""Guidance: a step away from the prediction of a weaker model, the guide.

    p = p_guide + w (p_model - p_guide)                                  w = 1 is the model itself

Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598): the guide is the same model without the caption. Each
request is two segments of its row, with its caption and with the empty one. Both start from the same noise and take
the same guided step, so they stay equal.

Autoguidance (Karras et al. 2024, arXiv:2406.02507): the guide is a smaller or less trained model with the same caption.

At one x_t and t all kinds of prediction are affine in each other, so guiding any of them gives the same result; the
model's own is guided. Rescaling is not affine. It acts on the clean estimate, so its result does not depend on the kind
of prediction either.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from minisora_jax.diffusion.noise_path import NoisePath, solve, target
from minisora_jax.models.layers import per_slot_mean, per_token
from minisora_jax.parallel.mesh import take_in_row

MOST_GUIDANCE = 1000.0

# (w - 1) / mean(w - 1) at time t. "linear" and "cosine" are weak at first and strong at the end, which gives sharper
# and more varied images (Wang et al. 2024, arXiv:2404.13040).
SCHEDULES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "constant": lambda t: jnp.ones_like(t),
    "linear": lambda t: 2.0 * (1.0 - t),
    "cosine": lambda t: 1.0 + jnp.cos(jnp.pi * t),
}


@dataclasses.dataclass(frozen=True)
class GuidanceConfig:
    """Strength of guidance, and the times at which it acts.

    Raises:
        ValueError: The schedule is unknown, or a number is out of range.
    """

    scale: float = 3.0  # w; 1: no guidance
    # The times at which guidance acts, both ends included; w = 1 at other times (Kynkaanniemi et al. 2024,
    # arXiv:2404.07724). A noise level sigma of that paper is t = sigma / (1 + sigma) on the linear path.
    interval: tuple[float, float] = (0.0, 1.0)
    # How far the standard deviation of the clean estimate is restored to its value without guidance, from 0 (not at
    # all) to 1 (Lin et al. 2023, arXiv:2305.08891, section 3.4).
    rescale: float = 0.0
    schedule: str = "constant"  # w over time, with the same mean
    # Only this many of the latents' first channels are guided; None: all. The authors of DiT and SiT guide 3.
    channels: int | None = None
    low_noise: float | None = None  # w of a pair's expert for low noise (Wan 2.2 A14B); None: `scale`

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"guidance schedule={self.schedule!r} must be one of {', '.join(SCHEDULES)}")
        for name, scale in (("scale", self.scale), ("low_noise", self.low_noise)):
            if scale is not None and not abs(scale) <= MOST_GUIDANCE:  # also for NaN
                raise ValueError(f"guidance {name}={scale} must be a number up to {MOST_GUIDANCE:g} (1: no guidance)")
        low, high = self.interval
        if not 0 <= low < high <= 1:
            raise ValueError(f"guidance interval {low}-{high} must be two rising times from 0 (clean) to 1 (noise)")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance rescale={self.rescale} must be in [0, 1]")
        if self.channels is not None and self.channels < 1:
            raise ValueError(f"guidance channels={self.channels} must be at least 1; scale=1 guides none")

    @property
    def acts(self) -> bool:
        """Whether there is a time at which it changes a prediction."""
        return self.scale != 1 or self.low_noise not in (None, 1)

    @property
    def static(self) -> tuple[float, str, int | None]:
        """The settings that a sampling step is compiled for: (rescale, schedule, channels)."""
        return self.rescale, self.schedule, self.channels


def twins(p_BSP: jax.Array, with_caption_BS: jax.Array, without_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The predictions with and without the caption for each token.

    Args:
        p_BSP: Predictions of rows in which each request has two segments.
        with_caption_BS: For each token, the place in its row of the same token in the segment with the caption.
        without_BS: The place of the same token in the segment without the caption.

    Returns:
        (p with caption, p without), both (B, S, P).
    """
    return take_in_row(p_BSP, with_caption_BS), take_in_row(p_BSP, without_BS)


def weight(
    time_BS: jax.Array,
    scale: jax.Array | float,
    interval: tuple[float, float] = (0.0, 1.0),
    schedule: str = "constant",
) -> jax.Array:
    """w of each token, (B, S): 1 at times outside the interval.

    Args:
        time_BS: Time of each token.
        scale: Mean of w over time; one for all tokens, or (B, S).
        interval: See `GuidanceConfig`.
        schedule: A key of SCHEDULES.
    """
    guided_BS = (time_BS >= interval[0]) & (time_BS <= interval[1])
    return jnp.where(guided_BS, 1.0 + (scale - 1.0) * SCHEDULES[schedule](time_BS), 1.0)


def guide(model_BSP: jax.Array, guide_BSP: jax.Array, w_BS: jax.Array) -> jax.Array:
    """The guided prediction: p_guide + w (p_model - p_guide).

    Args:
        model_BSP: Prediction of the model.
        guide_BSP: Prediction of the guide.
        w_BS: See `weight`.
    """
    return guide_BSP + w_BS[..., None] * (model_BSP - guide_BSP)


def rescale(
    path: NoisePath,
    prediction: str,
    guided_BSP: jax.Array,
    model_BSP: jax.Array,
    x_BSP: jax.Array,
    time_BS: jax.Array,
    segment_BS: jax.Array,
    slots: int,
    share: float,
) -> jax.Array:
    """The guided prediction, rescaled so that its clean estimate has the spread of the model's own in each clip.

    Tokens at time 0 keep their guided prediction, because no prediction gives their noise.

    Args:
        path: Noise path.
        prediction: Kind of the predictions.
        guided_BSP: Guided prediction.
        model_BSP: Prediction of the model.
        x_BSP: x_t.
        time_BS: Time of each token.
        segment_BS: Segment ids, 0 for padding and for tokens that are given.
        slots: G.
        share: Share of the rescaled estimate in the result, 0 to 1.
    """
    time = time_BS[..., None]
    clean = lambda p_BSP: solve(path, prediction, p_BSP, x_BSP, time)[0]
    guided_clean_BSP = clean(guided_BSP)
    ratio_BS1 = _spread(clean(model_BSP), segment_BS, slots) / _spread(guided_clean_BSP, segment_BS, slots)
    clean_BSP = guided_clean_BSP * (1.0 - share + share * ratio_BS1)
    noise_BSP = (x_BSP - path.alpha(time) * clean_BSP) / jnp.maximum(path.sigma(time), 1e-6)
    return jnp.where(time > 0, target(path, prediction, clean_BSP, noise_BSP, time), guided_BSP)


def _spread(x_BSP: jax.Array, segment_BS: jax.Array, slots: int) -> jax.Array:
    """The standard deviation within each token's own clip, (B, S, 1), at least 1e-6."""
    mean_BG1 = per_slot_mean(x_BSP, segment_BS, slots).mean(-1, keepdims=True)
    centred_BSP = x_BSP - per_token(mean_BG1, segment_BS)
    variance_BG1 = per_slot_mean(centred_BSP**2, segment_BS, slots).mean(-1, keepdims=True)
    return jnp.sqrt(jnp.maximum(per_token(variance_BG1, segment_BS), 1e-12))
