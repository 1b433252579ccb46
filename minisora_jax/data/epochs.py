"""The order of the clips in each epoch: a pure function of (seed, epoch), computed in parts of bounded size.

An epoch has as many entries as there are clips. The share of data set d, with n_d clips and weight w_d, is proportional
to w_d n_d^(1/T). With all weights 1 and temperature T = 1 every clip comes once an epoch; a higher T raises the share
of small sets (Arivazhagan et al. 2019, arXiv:1907.05019). Each set has cycles of its own: a clip comes again only after
all others of its set.

No array is as long as the data set: the shuffle is a function of one position (a Feistel network), so the n-th million
of an epoch's order takes the memory of a million entries.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

PART = 2**20  # at most so many entries are planned at a time
UNLIMITED = 2**31 - 1  # a size that no clip exceeds
ROUNDS = 6  # rounds of the Feistel network


@dataclasses.dataclass(frozen=True)
class Epochs:
    """The order of the clips of concatenated data sets.

    Args:
        counts: the number of clips of each data set.
        weights: the weight of each data set; () for 1 each.
        temperature: T in the module's docstring.
        members: for each data set the indices of its clips that take part; None for all.
        part_size: at most so many entries are planned at a time.
    """

    counts: tuple[int, ...]
    seed: int
    weights: tuple[float, ...] = ()
    temperature: float = 1.0
    members: tuple[np.ndarray | None, ...] = ()
    part_size: int = PART

    def __post_init__(self):
        if self.temperature <= 0 or any(w < 0 for w in self.weights):
            raise ValueError(f"temperature={self.temperature} and weights={self.weights} must be positive")
        if sum(self.sizes) == 0 or sum(self.entries) == 0:
            raise ValueError(
                f"no clip takes part: the data sets have {self.counts} clips and weights {self.weights}. Raise a "
                "weight, or allow larger clips in the curriculum"
            )

    @property
    def sizes(self) -> list[int]:
        """The number of clips of each data set that take part."""
        members = self.members or (None,) * len(self.counts)
        return [n if m is None else len(m) for n, m in zip(self.counts, members)]

    @property
    def clips(self) -> np.ndarray | slice:
        """The indices of all clips that take part, in the concatenated data sets."""
        if all(m is None for m in self.members):
            return slice(None)
        starts = np.cumsum([0, *self.counts])
        members = [np.arange(n) if m is None else m for n, m in zip(self.counts, self.members, strict=True)]
        return np.concatenate([start + indices for start, indices in zip(starts, members)])

    @property
    def entries(self) -> list[int]:
        """The number of entries of an epoch from each data set."""
        sizes = np.array(self.sizes, np.float64)
        shares = np.array(self.weights or [1.0] * len(sizes)) * sizes ** (1 / self.temperature)
        exact = sizes.sum() * shares / max(shares.sum(), 1e-300)
        entries = np.floor(exact).astype(np.int64)
        largest_rest = np.argsort(-(exact - entries), kind="stable")[: int(sizes.sum() - entries.sum())]
        entries[largest_rest] += 1
        return entries.tolist()

    @property
    def parts(self) -> int:
        """The number of parts of an epoch; all parts have about the same size."""
        return -(-sum(self.entries) // self.part_size)

    def epoch(self, part: int) -> int:
        """The epoch of a part."""
        return part // self.parts

    def part(self, n: int) -> tuple[int, np.ndarray]:
        """(epoch, int64 indices of its clips in order) of part n, counted from the start of the run."""
        epoch, part = divmod(n, self.parts)
        entries = self.entries
        total = sum(entries)
        first, last = (total * i // self.parts for i in (part, part + 1))
        places = _shuffled(np.arange(first, last), total, self.seed, 2 * epoch)
        clips = np.empty(len(places), np.int64)
        ends, starts = np.cumsum(entries), np.cumsum([0, *self.counts])
        for d, (end, count) in enumerate(zip(ends, entries)):
            of_set = np.flatnonzero((places >= end - count) & (places < end))
            clips[of_set] = starts[d] + self._set_clips(d, epoch * count + places[of_set] - (end - count))
        return epoch, clips

    def _set_clips(self, d: int, draws: np.ndarray) -> np.ndarray:
        """The clips of data set d at its n-th draws. Each cycle through the set has an order of its own."""
        size = self.sizes[d]
        indices = np.empty(len(draws), np.int64)
        for cycle in np.unique(draws // size):
            of_cycle = draws // size == cycle
            indices[of_cycle] = _shuffled(draws[of_cycle] % size, size, self.seed + 1000 * (d + 1), 2 * int(cycle) + 1)
        members = self.members[d] if self.members else None
        return indices if members is None else members[indices]


def _shuffled(places: np.ndarray, count: int, seed: int, stream: int) -> np.ndarray:
    """The images of `places` under a permutation of 0 ... count - 1; (seed, stream) selects the permutation.

    It is a Feistel network over the next power of 4, applied again until the result is below `count` (cycle walking:
    Black & Rogaway 2002, doi:10.1007/3-540-45760-7_9). The halves are mixed as in SplitMix64.
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.SeedSequence([seed, stream]).generate_state(ROUNDS, np.uint64)

    def walk(x):
        left, right = x >> half, x & mask
        for key in keys:
            mixed = (right ^ key) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((mixed >> np.uint64(29)) & mask)
        return (left << half) | right

    moved = walk(places.astype(np.uint64))
    while len(outside := np.flatnonzero(moved >= count)):
        moved[outside] = walk(moved[outside])
    return moved.astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of a curriculum: until step `until`, clips have at most `max_thw` latent frames, rows and columns."""

    until: int
    max_thw: tuple[int, int, int]


def curriculum(text: str, steps: int) -> list[Stage]:
    """The stages of a curriculum such as "1000:1x32x32 5000:5x32x32"; a last stage with all clips lasts until `steps`.

    The example trains on images until step 1000, then on short clips until step 5000. Sizes are latent frames x rows x
    columns: with a codec of 4 x 8 x 8, 5x32x32 is 17 frames of 256 x 256 pixels.

    Raises:
        ValueError: a stage has another form, or its step does not rise.
    """
    stages = []
    for word in text.split():
        match = re.fullmatch(r"(\d+):(\d+)x(\d+)x(\d+)", word)
        if not match:
            raise ValueError(
                f"curriculum {word!r} must look like 1000:1x32x32: until step, latent frames x rows x columns"
            )
        until, t, h, w = map(int, match.groups())
        if stages and until <= stages[-1].until:
            raise ValueError(
                f"curriculum {text!r}: the stages' steps must rise, and {until} follows {stages[-1].until}"
            )
        stages.append(Stage(until, (t, h, w)))
    if not stages or stages[-1].until < steps:
        stages.append(Stage(steps, (UNLIMITED, UNLIMITED, UNLIMITED)))
    return stages


@dataclasses.dataclass(frozen=True)
class Part:
    """One data set of a mixture: its directory, its weight, and the kind of conditioning mask of its clips."""

    directory: str
    weight: float = 1.0
    mask: str = ""  # a share of ConditioningConfig that all of its clips take; "": each clip draws one


def parse_mixture(text: str) -> list[Part]:
    """The data sets of "data/a + data/b*0.5 + data/c@between"; ValueError for text of another form."""
    mixture = []
    for word in text.split("+"):
        match = re.fullmatch(r"(?P<directory>.*?)(?:\*(?P<weight>[\d.]+))?(?:@(?P<mask>[a-z]+))?", word.strip())
        try:
            assert match and match["directory"]
            mixture.append(Part(match["directory"], float(match["weight"] or 1), match["mask"] or ""))
        except (AssertionError, ValueError) as error:
            raise ValueError(
                f"data {word.strip()!r} must look like DIR, DIR*WEIGHT or DIR*WEIGHT@MASK, such as data/a*0.5@between"
            ) from error
    return mixture


def within(sizes_thwL: Sequence | np.ndarray, stage: Stage) -> np.ndarray | None:
    """The indices of the clips that the stage allows; None for all clips."""
    if min(stage.max_thw) >= UNLIMITED:
        return None
    small = np.ones(len(sizes_thwL), bool)
    for first in range(0, len(sizes_thwL), PART):
        block = np.asarray(sizes_thwL[first : first + PART])
        small[first : first + PART] = (block[:, :3] <= stage.max_thw).all(axis=1)
    return np.flatnonzero(small).astype(np.int32 if len(small) < 2**31 else np.int64)
