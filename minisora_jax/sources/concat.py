"""Several sources, one after the other: "clips/ + films/*.tar + gs://bucket/more"."""

from __future__ import annotations

import dataclasses
import hashlib
import re

from minisora_jax.io.concat_index import ConcatIndex
from minisora_jax.sources.actions import common_names
from minisora_jax.sources.base import Media, Source
from minisora_jax.sources.skips import SkipReport


class ConcatSource:
    """Concatenated sources. A clip's name begins with its source's label, as in films/cat.mp4.

    There are no weights here: training weights mixtures of prepared data sets.

    Args:
        specs: the name of each source, see sources/spec.py. Its last part becomes the label.
        sources: the opened sources, one for each spec.
        strict: raise BadClip instead of skipping.

    Raises:
        DataError: two sources have different actions.
    """

    def __init__(self, specs: list[str], sources: list[Source], *, strict: bool = False):
        self.sources, self.labels = sources, _labels(specs)
        self.actions = common_names((spec, source.actions) for spec, source in zip(specs, sources))
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
        return dataclasses.replace(media, name=f"{self.labels[number]}/{media.name}")

    def __getstate__(self):
        return self.__dict__ | {"report": SkipReport(self.report.strict)}


def _labels(specs: list[str]) -> list[str]:
    """A short unique label for each source."""
    labels: list[str] = []
    for spec in specs:
        last = spec.split("?")[0].rstrip("/").rpartition("/")[2]
        label = re.sub(r"[^\w.-]+", "-", last).strip("-.") or "source"
        number, unique = 2, label
        while unique in labels:
            number, unique = number + 1, f"{label}-{number}"
        labels.append(unique)
    return labels
