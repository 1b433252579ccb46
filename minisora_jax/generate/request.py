"""A request to the model: words, a size, a seed, and the latents of the video that are known already."""

from __future__ import annotations

import dataclasses
import math
import numbers

import numpy as np

from minisora_jax.types import GivenFrames


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
        prompt: what it shows; for a model of classes the number or the name of a class.
        size_THW: frames, height and width in pixels: 1 + 4k frames (4k of a loop or a middle stretch), height and width
            multiples of the pipeline's `cell`.
        seed: seed of the noise.
        fps: frames per second.
        negative: what it shall not show: guidance goes away from this prompt.
        given: latents that are known, or that sampling starts from.
        frames: given frames, for a model that reads them as channels of its input (Wan image to video).
        middle: whether it is 4k frames from the middle of a longer video. A clip's first frame is a latent frame by
            itself; in a middle stretch every latent frame stands for 4 frames.
        guided: the share of the guidance, w - 1, that acts. Where much of a video is known, words matter less.
        loop: whether the end meets the beginning; time is then a circle.
        spacing: distance of neighbouring tokens in t, y, x; below 1, a video larger than those of training is put onto
            the grid of training (position interpolation: Chen et al. 2023, arXiv:2306.15595).

    Raises:
        ValueError: a value is of another type, or is not a number.

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
    frames: GivenFrames | None = None
    guided: float = 1.0
    middle: bool = False
    loop: bool = False
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self):
        for name, text in (("prompt", self.prompt), ("negative", self.negative)):
            if not isinstance(text, str) or any("\ud800" <= c <= "\udfff" for c in text):
                raise ValueError(f"{name}={text!r:.60} must be text, without lone surrogates")
        if len(self.size_THW) != 3 or not all(isinstance(n, numbers.Integral) for n in self.size_THW):
            raise ValueError(f"frames, height and width are {self.size_THW}: give three whole numbers, as (17, 48, 64)")
        if not isinstance(self.seed, numbers.Integral) or self.seed < 0:
            raise ValueError(f"seed={self.seed!r:.60} must be a whole number, at least 0")
        if not (isinstance(self.fps, numbers.Real) and 0 < self.fps < math.inf):
            raise ValueError(f"fps={self.fps!r:.60} must be a number above 0")

    @property
    def first(self) -> int:
        """The time position of its first latent frame; 0 is the first latent frame of a clip."""
        return int(self.middle or self.loop)


def image_size(image_HWC: np.ndarray) -> tuple[int, int]:
    """(H, W) of an image; ValueError unless it is uint8 (H, W, 3)."""
    H, W = _size(image_HWC, "an image", ("H", "W"))
    return H, W


def video_size(video_THWC: np.ndarray) -> tuple[int, int, int]:
    """(T, H, W) of a video; ValueError unless it is uint8 (T, H, W, 3)."""
    T, H, W = _size(video_THWC, "a video", ("T", "H", "W"))
    return T, H, W


def _size(pixels: np.ndarray, what: str, axes: tuple[str, ...]) -> tuple[int, ...]:
    shape: tuple[int, ...] = getattr(pixels, "shape", ())
    dtype = getattr(pixels, "dtype", None)
    if len(shape) != len(axes) + 1 or shape[-1:] != (3,) or dtype != np.uint8 or 0 in shape:
        found = f"{dtype} {shape}" if shape else f"{pixels!r:.60}"
        raise ValueError(f"{what} is {found}: give uint8 ({', '.join(axes)}, 3), as ms.read_video returns")
    return shape[:-1]
