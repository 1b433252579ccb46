"""Which tokens of a training clip are given clean: what makes one model animate, extend, connect and inpaint.

And which clips are shown without their first frame. A codec's first latent frame is one picture, the others stand for
several; a stretch of the others alone is what a window of a longer video, or a loop, is made of.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools

import numpy as np


@dataclasses.dataclass(frozen=True)
class ConditioningConfig:
    """Shares of clips trained with each kind of known tokens; the rest have none (text to video).

    Images, having one frame, take only `box` and `outside`.
    """

    first: float = 0.12  # the first frame: image to video
    last: float = 0.04  # the last frame
    ends: float = 0.06  # first and last: join two images
    prefix: float = 0.06  # some first frames: extend forwards
    suffix: float = 0.04  # some last frames: extend backwards
    frames: float = 0.04  # any frames
    box: float = 0.04  # all frames outside a box: inpaint
    outside: float = 0.02  # all frames inside a box: outpaint
    middle: float = 0.1  # share of all clips, whatever is known of them, that are shown from a later frame on

    def __post_init__(self):
        if min(self._shares) < 0 or sum(self._shares) > 1:
            raise ValueError(f"known shares {dataclasses.asdict(self)} must be positive and sum to at most 1")
        if not 0 <= self.middle < 1:
            raise ValueError(f"known.middle={self.middle} must be in [0, 1)")

    @property
    def _shares(self) -> tuple[float, ...]:
        return dataclasses.astuple(self)[:-1]

    def stretches(self, clips_n: np.ndarray, frames_n: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """int32 (n, 2): from and to which latent frame each clip is shown, (0, frames) or 1 <= start < stop <= frames.

        A function of the clip's number, its length and the epoch: every host knows it of every clip, unread.
        """
        key = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)
        key = key + np.uint64(3) * clips_n.astype(np.uint64)
        chosen, first, length = (_uniform(key + np.uint64(i)) for i in range(3))
        start = 1 + (first * (frames_n - 1)).astype(np.int32)
        stop = start + 1 + (length * (frames_n - start)).astype(np.int32)
        shown = np.where((chosen < self.middle) & (frames_n > 1), [start, stop], [np.zeros_like(frames_n), frames_n])
        return shown.T.astype(np.int32)

    @functools.cached_property
    def _edges(self) -> tuple[list[str], list[float]]:
        """The kinds, and the draw below which each lies."""
        return [f.name for f in dataclasses.fields(self)][:-1], np.cumsum(self._shares).tolist()

    def draw(self, size_thw: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
        """bool (t, h, w): the known tokens of one clip; at least one token is always unknown."""
        t, h, w = size_thw
        cond_mask = np.zeros(size_thw, bool)
        kinds, edges = self._edges
        # Draw everything in every case, so that one clip's kind never shifts another's randomness.
        which, cut, flips = rng.random(), int(rng.integers(1, max(t, 2))), rng.random(t) < 0.5
        y0, y1 = sorted((rng.integers(h + 1), rng.integers(h + 1)))
        x0, x1 = sorted((rng.integers(w + 1), rng.integers(w + 1)))
        kind = kinds[bisect.bisect_right(edges, which)] if which < edges[-1] else "none"
        if kind in ("box", "outside"):
            if y0 < y1 and x0 < x1:
                cond_mask[:, y0:y1, x0:x1] = True
                if kind == "box" or cond_mask.all():
                    cond_mask = ~cond_mask
        elif t > 1 and kind != "none":
            chosen = {
                "first": [0],
                "last": [t - 1],
                "ends": [0, t - 1] if t > 2 else [0],
                "prefix": np.arange(cut),
                "suffix": np.arange(cut, t),
                "frames": np.flatnonzero(flips) if not flips.all() else [0],
            }[kind]
            cond_mask[chosen] = True
        return cond_mask


def _uniform(number: np.ndarray) -> np.ndarray:
    """[0, 1) from uint64, each by itself: SplitMix64 (Steele et al. 2014, doi:10.1145/2660193.2660195)."""
    z = number * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53
