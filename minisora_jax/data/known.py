"""Which tokens of a training clip are given clean: what makes one model animate, extend, connect and inpaint."""

from __future__ import annotations

import bisect
import dataclasses
import functools

import numpy as np


@dataclasses.dataclass(frozen=True)
class KnownConfig:
    """Shares of clips trained with each kind of known tokens; the rest have none (text to video).

    Images, having one frame, take only `box`.
    """

    first: float = 0.12  # the first frame: image to video
    last: float = 0.04  # the last frame
    ends: float = 0.06  # first and last: join two images
    prefix: float = 0.06  # some first frames: extend forwards
    suffix: float = 0.04  # some last frames: extend backwards
    frames: float = 0.04  # any frames
    box: float = 0.04  # all frames outside a box: inpaint

    def __post_init__(self):
        shares = dataclasses.astuple(self)
        if min(shares) < 0 or sum(shares) > 1:
            raise ValueError(f"known shares {dataclasses.asdict(self)} must be positive and sum to at most 1")

    @functools.cached_property
    def _edges(self) -> tuple[list[str], list[float]]:
        """The kinds, and the draw below which each lies."""
        return [f.name for f in dataclasses.fields(self)], np.cumsum(dataclasses.astuple(self)).tolist()

    def draw(self, size_thw: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
        """bool (t, h, w): the known tokens of one clip; at least one token is always unknown."""
        t, h, w = size_thw
        known = np.zeros(size_thw, bool)
        kinds, edges = self._edges
        # Draw everything in every case, so that one clip's kind never shifts another's randomness.
        which, cut, flips = rng.random(), int(rng.integers(1, max(t, 2))), rng.random(t) < 0.5
        y0, y1 = sorted((rng.integers(h + 1), rng.integers(h + 1)))
        x0, x1 = sorted((rng.integers(w + 1), rng.integers(w + 1)))
        kind = kinds[bisect.bisect_right(edges, which)] if which < edges[-1] else "none"
        if kind == "box":
            if y0 < y1 and x0 < x1:
                known[:] = True
                known[:, y0:y1, x0:x1] = False
        elif t > 1 and kind != "none":
            chosen = {
                "first": [0],
                "last": [t - 1],
                "ends": [0, t - 1] if t > 2 else [0],
                "prefix": np.arange(cut),
                "suffix": np.arange(cut, t),
                "frames": np.flatnonzero(flips) if not flips.all() else [0],
            }[kind]
            known[chosen] = True
        return known
