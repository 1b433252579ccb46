"""Look up an index in several sequences that are read as one."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable


class ConcatIndex:
    """The index of concatenated sequences, from their lengths."""

    def __init__(self, lengths: Iterable[int]):
        self._ends = [0, *itertools.accumulate(map(int, lengths))]

    def __len__(self) -> int:
        return self._ends[-1]

    def locate(self, i: int) -> tuple[int, int]:
        """(number of the sequence, index within it) of item i of all; IndexError out of range."""
        if not 0 <= i < self._ends[-1]:
            raise IndexError(f"index {i} is out of range for {self._ends[-1]} items")
        member = bisect.bisect_right(self._ends, i) - 1
        return member, i - self._ends[member]
