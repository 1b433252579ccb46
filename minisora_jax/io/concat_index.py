"""Sequences laid end to end, and looked up as one."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable


class Ends:
    """Where each of several sequences ends when they are laid end to end."""

    def __init__(self, lengths: Iterable[int]):
        self._ends = [0, *itertools.accumulate(map(int, lengths))]

    def __len__(self) -> int:
        return self._ends[-1]

    def place(self, i: int) -> tuple[int, int]:
        """(which sequence, place within it) of the i-th of all. IndexError where there is none."""
        if not 0 <= i < self._ends[-1]:
            raise IndexError(f"index {i} of {self._ends[-1]}")
        which = bisect.bisect_right(self._ends, i) - 1
        return which, i - self._ends[which]
