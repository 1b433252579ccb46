"""What is asked of the model: words, a size, a seed, and what of the video is known already."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Given:
    """What of a video is known, or what it starts from, on the grid of latents."""

    latents_thwc: np.ndarray  # float32, as the codec encodes; what is not known counts only where strength < 1
    cond_mask_thw: np.ndarray  # bool, by token (a patch of latents): those kept as they are
    strength: float = 1.0  # noise that the others start from: below 1 they stay near the latents (SDEdit: Meng et al.
    # 2021, arXiv:2108.01073)

    def __post_init__(self):
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength={self.strength} must be above 0 (as it is) and at most 1 (all anew)")
        if self.cond_mask_thw.all():
            raise ValueError("all of the video is known already: nothing is left to make")


@dataclasses.dataclass(frozen=True)
class Request:
    """One video asked for. Sizes are pixels: T = 1 + 4k frames, H and W multiples of the model's cell.

    middle: 4k frames from the middle of a longer video, none of which is coded by itself as a first one is.
    loop: 4k frames whose end meets their beginning; time is a circle.
    """

    prompt: str  # of a model of classes, the number of one
    size_THW: tuple[int, int, int]
    seed: int = 0
    fps: float = 8.0
    negative: str = ""  # what it should not be: guidance goes away from this prompt
    given: Given | None = None
    middle: bool = False
    loop: bool = False
    spacing: tuple[float, float, float] = (
        1.0,
        1.0,
        1.0,
    )  # of its tokens in t, y, x: below 1, a video larger than those
    # of training is put onto the grid that they had (position interpolation: Chen et al. 2023, arXiv:2306.15595)

    @property
    def first(self) -> int:
        """The place in time of its first latent frame: 0 is a clip's own first one."""
        return int(self.middle or self.loop)
