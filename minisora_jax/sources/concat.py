"""Several sources as one: "clips/ + films/*.tar + gs://bucket/more"."""

from __future__ import annotations

import hashlib
import re

from minisora_jax.io.concat_index import ConcatIndex
from minisora_jax.sources.base import Media, SkipReport, Source


class Together:
    """Sources end to end. A clip's name begins with its source's, the last part of the spelling, as in films/cat.mp4.

    Weights are not for here: a data set is prepared once, and mixtures of several are weighted in training.
    """

    def __init__(self, spellings: list[str], sources: list[Source], *, strict: bool = False):
        self.sources, self.labels = sources, _labels(spellings)
        self.concat_index = ConcatIndex(map(len, sources))
        self.report = SkipReport(strict)
        for label, source in zip(self.labels, sources):
            self.report.skipped += [row | {"name": f"{label}/{row['name']}"} for row in source.report.skipped]
        metadata = "\n".join(f"{label} {source.identity}" for label, source in zip(self.labels, sources))
        self.identity = f"together:{hashlib.sha256(metadata.encode('utf-8')).hexdigest()}"

    def __len__(self) -> int:
        return len(self.concat_index)

    def __getitem__(self, i: int) -> Media:
        number, at = self.concat_index.locate(i)
        media = self.sources[number][at]
        return Media(f"{self.labels[number]}/{media.name}", media.caption, media.data, media.fps)

    def __getstate__(self):
        return self.__dict__ | {"report": SkipReport(self.report.strict)}


def _labels(spellings: list[str]) -> list[str]:
    """A short name of each, no two the same."""
    labels: list[str] = []
    for spelling in spellings:
        last = spelling.split("?")[0].rstrip("/").rpartition("/")[2]
        label = re.sub(r"[^\w.-]+", "-", last).strip("-.") or "source"
        number, unique = 2, label
        while unique in labels:
            number, unique = number + 1, f"{label}-{number}"
        labels.append(unique)
    return labels
