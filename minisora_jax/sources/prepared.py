"""A prepared data set as a source: to join several, to crop to another cell, or to filter again."""

from __future__ import annotations

import os

import numpy as np

from minisora_jax.io.filesystem import is_url
from minisora_jax.io.retry import DataError
from minisora_jax.media.video import VideoError
from minisora_jax.sources.base import Media, reopened
from minisora_jax.sources.clips import Records
from minisora_jax.sources.skips import SkipReport


class Prepared:
    """The clips of a prepared data set with their stored frames. The table of sizes shows which have no caption."""

    def __init__(self, directory: str | os.PathLike, *, need_caption: bool = True, strict: bool = False):
        self.directory = os.fspath(directory) if is_url(directory) else os.path.abspath(directory)
        self.need_caption, self.report, self.records = need_caption, SkipReport(strict), Records(self.directory)
        self.actions = self.records.actions
        kept = self.records.sizes[:, 3] > 0 if need_caption else np.ones(len(self.records), bool)
        for i in np.flatnonzero(~kept):
            self.report.add(f"record {i}", "no caption", f"in {directory}")
        self.numbers = np.flatnonzero(kept)
        self.identity = f"prepared:{self.records.identity}{'' if need_caption else ' without captions'}"

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> Media:
        try:
            clip = self.records[int(self.numbers[i])]
        except DataError as error:
            return Media(f"record {self.numbers[i]}", "", VideoError("corrupt record", str(error)))
        return Media(clip.name, clip.caption, clip.frames_THWC, clip.fps, actions_TA=clip.actions_TA)

    def __reduce__(self):
        return reopened, (Prepared, (self.directory,), self.need_caption, self.identity)
