"""A request to the model: words, a size, a seed, and the latents of the video that are known already."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, repr=False)
class Given:
    """Latents of a video that are known, or that sampling starts from."""

    latents_thwc: np.ndarray  # float32, as the codec encodes; unknown ones are read only if strength < 1
    cond_mask_thw: np.ndarray  # bool, by token (a patch of latents): the tokens that are known and stay
    strength: float = 1.0  # noise that the other tokens start from; below 1 they stay near the latents (SDEdit: Meng et
    # al. 2021, arXiv:2108.01073)

    def __repr__(self) -> str:
        shape, share = "x".join(map(str, self.latents_thwc.shape)), self.cond_mask_thw.mean()
        return f"Given(latents {shape}, {share:.0%} of the tokens known, strength {self.strength:g})"

    def __post_init__(self):
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength={self.strength} must be above 0 (as it is) and at most 1 (all anew)")
        if self.cond_mask_thw.all():
            raise ValueError("the whole video is known: nothing is left to make")


@dataclasses.dataclass(frozen=True)
class Request:
    """One video for the model to sample.

    Args:
        prompt: what it shows; for a model of classes the number of a class.
        size_THW: frames, height and width in pixels: 1 + 4k frames (4k of a loop or a middle stretch), height and width
            multiples of the pipeline's `cell`.
        seed: seed of the noise.
        fps: frames per second.
        negative: what it shall not show: guidance goes away from this prompt.
        given: latents that are known, or that sampling starts from.
        middle: whether it is 4k frames from the middle of a longer video. A clip's first frame is a latent frame by
            itself; in a middle stretch every latent frame stands for 4 frames.
        guided: the share of the guidance, w - 1, that acts. Where much of a video is known, words matter less.
        loop: whether the end meets the beginning; time is then a circle.
        spacing: distance of neighbouring tokens in t, y, x; below 1, a video larger than those of training is put onto
            the grid of training (position interpolation: Chen et al. 2023, arXiv:2306.15595).

    Example:
        >>> import minisora_jax as ms
        >>> ms.Request("a red circle moves left on a black background", (17, 48, 48), seed=3).fps
        8.0
    """

    prompt: str
    size_THW: tuple[int, int, int]
    seed: int = 0
    fps: float = 8.0
    negative: str = ""
    given: Given | None = None
    guided: float = 1.0
    middle: bool = False
    loop: bool = False
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @property
    def first(self) -> int:
        """The time position of its first latent frame; 0 is the first latent frame of a clip."""
        return int(self.middle or self.loop)
