"""Which clips an epoch shows, and in which order: a pure function of (seed, epoch), in parts of bounded size.

An epoch has as many entries as there are clips. Data set d, of n_d clips and weight w_d, has a share of them in
proportion to w_d n_d^(1/T): with all weights 1 and temperature T = 1 every clip comes once an epoch; a higher T lifts
the small sets (Arivazhagan et al. 2019, arXiv:1907.05019). A set goes round by itself: no clip of it comes again before
all others of it have come.

Nothing as long as the data set is ever made: a shuffle is a function of one place (a Feistel network), so the
n-th million of an epoch's order takes the memory of a million.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

PART = 2**20  # entries planned together at most
ROUNDS = 6  # of the Feistel network


@dataclasses.dataclass(frozen=True)
class Epochs:
    """The order of the clips of data sets laid end to end, of `counts` clips each.

    members: for each data set None, or which of its clips take part (int array of indices within the set).
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
            raise ValueError(f"no clip takes part: data sets of {self.counts} clips, weights {self.weights}")

    @property
    def sizes(self) -> list[int]:
        """Clips of each data set that take part."""
        members = self.members or (None,) * len(self.counts)
        return [n if m is None else len(m) for n, m in zip(self.counts, members)]

    @property
    def clips(self) -> np.ndarray | slice:
        """All that take part, end to end."""
        if all(m is None for m in self.members):
            return slice(None)
        starts = np.cumsum([0, *self.counts])
        each = [np.arange(n) if m is None else m for n, m in zip(self.counts, self.members, strict=True)]
        return np.concatenate([start + some for start, some in zip(starts, each)])

    @property
    def entries(self) -> list[int]:
        """Of an epoch, from each data set."""
        sizes = np.array(self.sizes, np.float64)
        wanted = np.array(self.weights or [1.0] * len(sizes)) * sizes ** (1 / self.temperature)
        exact = sizes.sum() * wanted / max(wanted.sum(), 1e-300)
        entries = np.floor(exact).astype(np.int64)
        largest_rest = np.argsort(-(exact - entries), kind="stable")[: int(sizes.sum() - entries.sum())]
        entries[largest_rest] += 1
        return entries.tolist()

    @property
    def parts(self) -> int:
        """Of an epoch; all of about one size."""
        return -(-sum(self.entries) // self.part_size)

    def epoch(self, part: int) -> int:
        return part // self.parts

    def part(self, n: int) -> tuple[int, np.ndarray]:
        """(epoch, clips in their order) of part n, counted from the start of the run. int64 indices end to end."""
        epoch, part = divmod(n, self.parts)
        entries = self.entries
        total = sum(entries)
        first, last = (total * i // self.parts for i in (part, part + 1))
        places = _shuffled(np.arange(first, last), total, self.seed, 2 * epoch)
        clips = np.empty(len(places), np.int64)
        ends, starts = np.cumsum(entries), np.cumsum([0, *self.counts])
        for d, (end, count) in enumerate(zip(ends, entries)):
            mine = np.flatnonzero((places >= end - count) & (places < end))
            clips[mine] = starts[d] + self._of_set(d, epoch * count + places[mine] - (end - count))
        return epoch, clips

    def _of_set(self, d: int, turns: np.ndarray) -> np.ndarray:
        """Clips of a data set at its turns, which go round it cycle after cycle, each in an order of its own."""
        size = self.sizes[d]
        found = np.empty(len(turns), np.int64)
        for cycle in np.unique(turns // size):
            mine = turns // size == cycle
            found[mine] = _shuffled(turns[mine] % size, size, self.seed + 1000 * (d + 1), 2 * int(cycle) + 1)
        return found if not self.members or self.members[d] is None else self.members[d][found]


def _shuffled(places: np.ndarray, count: int, seed: int, stream: int) -> np.ndarray:
    """Where a shuffle of `count` things, one of its own for each (seed, stream), takes these.

    A Feistel network over the next power of 4, walked until it comes back below `count` (Black & Rogaway 2002,
    doi:10.1007/3-540-45760-7_9); the halves are mixed as in SplitMix64.
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
    """Of a curriculum: until step `until` of the run, clips of at most so many latent frames, rows and columns."""

    until: int
    max_thw: tuple[int, int, int]


def curriculum(text: str, steps: int) -> list[Stage]:
    """The stages of "1000:1x32x32 5000:5x32x32": images first, then short clips, then, until `steps`, everything.

    Sizes are latent frames x rows x columns: with a codec of 4 x 8 x 8, 5x32x32 is 17 frames of 256 x 256 pixels.
    """
    stages = []
    for word in text.split():
        match = re.fullmatch(r"(\d+):(\d+)x(\d+)x(\d+)", word)
        if not match:
            raise ValueError(
                f"curriculum {word!r} must look like 1000:1x32x32: until step, latent frames x rows x columns"
            )
        until, *size = map(int, match.groups())
        if stages and until <= stages[-1].until:
            raise ValueError(
                f"curriculum {text!r}: the stages' steps must rise, and {until} follows {stages[-1].until}"
            )
        stages.append(Stage(until, tuple(size)))
    if not stages or stages[-1].until < steps:
        stages.append(Stage(steps, (2**31 - 1,) * 3))
    return stages


def parse_mixture(text: str) -> list[tuple[str, float]]:
    """[(directory, weight)] of "data/a + data/b*0.5"."""
    found = []
    for word in text.split("+"):
        name, star, weight = word.strip().rpartition("*")
        try:
            found.append((name, float(weight)) if star else (word.strip(), 1.0))
        except ValueError as error:
            raise ValueError(f"data {word.strip()!r} must look like DIR or DIR*WEIGHT, such as data/a*0.5") from error
    if any(not name or weight < 0 for name, weight in found):
        raise ValueError(f"data {text!r} must look like DIR or DIR*WEIGHT + DIR*WEIGHT")
    return found


def within(sizes_thwL: Sequence, stage: Stage) -> np.ndarray | None:
    """Which clips are no larger than the stage allows; None for all of them."""
    if min(stage.max_thw) >= 2**31 - 1:
        return None
    small = np.ones(len(sizes_thwL), bool)
    for first in range(0, len(sizes_thwL), PART):
        block = np.asarray(sizes_thwL[first : first + PART])
        small[first : first + PART] = (block[:, :3] <= stage.max_thw).all(axis=1)
    return np.flatnonzero(small).astype(np.int32 if len(small) < 2**31 else np.int64)
