"""Draw the conditioning mask of each training clip, and the latent frames that training shows of it.

Tokens that are given clean teach one model image to video, extending, interpolation and inpainting. Some clips are
shown without their first latent frame. It stands for one frame of video, and each later one for several; windows of a
long video, and loops, consist of later latent frames only.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import re
from pathlib import Path

import numpy as np

from minisora_jax.io.model_dir import load_config


@dataclasses.dataclass(frozen=True)
class ConditioningConfig:
    """The share of training clips with each kind of conditioning mask. The other clips have none: text to video.

    An image has one frame, so it takes only `box` and `outside`. A data set may fix the kind of its clips' masks:
    `data/a + data/b@between` (data/epochs.py).
    """

    first: float = 0.12  # the first latent frame is given: image to video
    last: float = 0.04  # the last latent frame is given
    ends: float = 0.06  # the first and the last are given: interpolation
    prefix: float = 0.06  # several first latent frames are given: extending forwards
    suffix: float = 0.04  # several last latent frames are given: extending backwards
    frames: float = 0.04  # any latent frames are given
    box: float = 0.04  # everything outside a box is given: inpainting
    outside: float = 0.02  # everything inside a box is given: outpainting
    between: float = 0.0  # several first and several last latent frames are given: transitions and loops
    middle: float = 0.1  # share of all clips, with any mask, that are shown from a later latent frame on

    def __post_init__(self):
        if min(self._shares) < 0 or sum(self._shares) > 1:
            raise ValueError(f"conditioning shares {dataclasses.asdict(self)} must be positive and sum to at most 1")
        if not 0 <= self.middle < 1:
            raise ValueError(f"conditioning.middle={self.middle} must be in [0, 1)")

    @property
    def _shares(self) -> tuple[float, ...]:
        return dataclasses.astuple(self)[:-1]

    def stretches(
        self, clips_n: np.ndarray, frames_n: np.ndarray, seed: int, epoch: int, fixed_n: np.ndarray | None = None
    ) -> np.ndarray:
        """The latent frames that training shows of each clip: int32 (n, 2) of start and stop.

        They are (0, frames) or 1 <= start < stop <= frames. They depend on the clip's number, its length, the seed and
        the epoch only, so every host knows them without reading the clips.

        Args:
            clips_n: the numbers of the clips.
            frames_n: their lengths in latent frames.
            fixed_n: bool, the clips whose data set fixes their kind of mask (data/epochs.py). Half of them are shown
                without their first latent frame, and whole otherwise.
        """
        key = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)
        key = key + np.uint64(3) * clips_n.astype(np.uint64)
        chosen, first, length = (_uniform(key + np.uint64(i)) for i in range(3))
        start = 1 + (first * (frames_n - 1)).astype(np.int32)
        stop = start + 1 + (length * (frames_n - start)).astype(np.int32)
        share = self.middle
        if fixed_n is not None:
            start, stop = np.where(fixed_n, 1, start), np.where(fixed_n, frames_n, stop)
            share = np.where(fixed_n, 0.5, share)
        shown = np.where((chosen < share) & (frames_n > 1), [start, stop], [np.zeros_like(frames_n), frames_n])
        return shown.T.astype(np.int32)

    def require_kind(self, kind: str) -> None:
        """Raise ValueError unless `kind` is a kind of mask."""
        if kind not in (kinds := self._edges[0]):
            raise ValueError(f"data ...@{kind}: the kinds of conditioning mask are {', '.join(kinds)}")

    @functools.cached_property
    def _edges(self) -> tuple[list[str], list[float]]:
        """(kinds, upper edges): a uniform draw below a kind's edge, and not below the one before, selects it."""
        return [f.name for f in dataclasses.fields(self)][:-1], np.cumsum(self._shares).tolist()

    def draw(self, size_thw: tuple[int, int, int], rng: np.random.Generator, kind: str = "") -> np.ndarray:
        """The conditioning mask of one clip: bool (t, h, w), True for given tokens. At least one token is False.

        Args:
            size_thw: the clip's size in tokens.
            kind: the kind of mask; "" draws it by the shares.
        """
        t, h, w = size_thw
        cond_mask = np.zeros(size_thw, bool)
        kinds, edges = self._edges
        # Draw all numbers in every case, so that the random stream does not depend on the kind.
        choice, cut, flips = rng.random(), int(rng.integers(1, max(t, 2))), rng.random(t) < 0.5
        y0, y1 = sorted((rng.integers(h + 1), rng.integers(h + 1)))
        x0, x1 = sorted((rng.integers(w + 1), rng.integers(w + 1)))
        before = min(cut, max(t - 2, 1))
        after = before + 1 + int(rng.random() * (t - 1 - before))
        drawn = kinds[bisect.bisect_right(edges, choice)] if choice < edges[-1] else "none"
        kind = kind or drawn
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
                "between": [*range(before), *range(after, t)],
                "frames": np.flatnonzero(flips) if not flips.all() else [0],
            }[kind]
            cond_mask[chosen] = True
        return cond_mask


KINDS = frozenset(field.name for field in dataclasses.fields(ConditioningConfig)) - {"middle"}


def taught_masks(shares: dict, data: str) -> frozenset[str]:
    """The kinds of mask that a training draws: by its shares, and by its data sets (`data/a@between`)."""
    drawn = {kind for kind, share in shares.items() if isinstance(share, int | float) and share > 0}
    return KINDS & (drawn | set(re.findall(r"@(\w+)", data)))


def recorded_masks(config: dict, directory: str | Path) -> frozenset[str] | None:
    """The kinds of mask that an exported model was trained with; None: it was written before they were recorded.

    Raises:
        ValueError: The record is damaged.
    """
    if (kinds := config.get("conditioning")) is not None:
        if not isinstance(kinds, list) or not all(isinstance(kind, str) and kind in KINDS for kind in kinds):
            known = ", ".join(sorted(KINDS))
            raise ValueError(f"{directory}/config.json: conditioning={kinds!r:.100} must be a list of {known}")
        return frozenset(kinds)
    training = config.get("training")
    part = lambda name: training[name] if isinstance(training, dict) and isinstance(training.get(name), dict) else {}
    shares = part("conditioning")
    return taught_masks(shares, str(part("data").get("path", ""))) if shares else None


def known_masks(config: ConditioningConfig, data: str, init: str | Path | None) -> list[str]:
    """The kinds of mask that a trained model knows: those of its training, and of the model `init` before it."""
    before = recorded_masks(load_config(init), init) if init else None
    return sorted(taught_masks(dataclasses.asdict(config), data) | (before or frozenset()))


def _uniform(number: np.ndarray) -> np.ndarray:
    """A number in [0, 1) for each uint64, by SplitMix64 (Steele et al. 2014, doi:10.1145/2660193.2660195)."""
    z = number * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53
