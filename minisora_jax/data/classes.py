"""Classes of a data set: clips whose caption is one of a few names, each of which gets a number in the latent cache."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from minisora_jax.data.latents import Latents
from minisora_jax.io.filesystem import is_url, open_regular, text_of
from minisora_jax.io.progress import Progress
from minisora_jax.io.retry import DataError
from minisora_jax.models.captions import class_names, in_words
from minisora_jax.models.class_names import ClassNames
from minisora_jax.sources.clips import Records
from minisora_jax.types import Clip, ClipSequence

log = logging.getLogger("minisora")

MOST_BYTES = 2**24  # of a file of names


def read_classes(path: str | os.PathLike) -> list[str]:
    """The names of the classes of a text file, one a line, or of a latent cache.

    Raises:
        ValueError: there are none, or one comes twice.
    """
    path = os.fspath(path)
    if is_url(path) or os.path.isdir(path):
        record = Latents(path).text
        if not (names := class_names(record)):
            raise ValueError(f"{path} has no classes: it was encoded with {in_words(record)}")
        return names
    with open_regular(Path(path)) as file:
        lines = [" ".join(line.split()) for line in text_of(file.read(MOST_BYTES)).splitlines()]
    names = list(filter(None, lines))
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise ValueError(f"{path} has the class {twice!r} twice: a line is a class")
    if not names:
        raise ValueError(f"{path} is empty: a line is the name of a class")
    return names


def classes_of(clips: ClipSequence, progress: bool = True) -> list[str]:
    """The captions of all clips, each once, in the order of their letters. Empty ones and damaged clips are left out.

    It reads every record, but decodes none of a prepared data set.
    """
    names: set[str] = set()
    for i in Progress(range(len(clips)), desc="classes", unit="clip", disable=not progress):
        try:
            names.add(clips.caption(i) if isinstance(clips, Records) else clips[i].caption)
        except DataError:
            continue
    names.discard("")
    if not names:
        raise DataError("no clip has a caption, so there are no classes: `prepare 'FOLDER?caption=folder'` names them")
    if 2 * len(names) > len(clips):
        log.warning(
            "%d clips have %d classes: if these are captions and not classes, encode without --classes",
            *(len(clips), len(names)),
        )
    return sorted(names)


class OfClasses:
    """Clips whose caption is a class. Reading another one is a DataError, so it is left out of a cache, and named."""

    def __init__(self, clips: ClipSequence, names: Sequence[str]):
        self.clips, self.names = clips, ClassNames(len(names), names)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, i: int) -> Clip:
        clip = self.clips[i]
        if self.names.of_caption(clip.caption) is None:
            what = (
                f"{clip.caption!r} is none of the {len(self.names.names)} classes"
                if clip.caption
                else "it has no class"
            )
            raise DataError(f"{clip.name}: {what}")
        return clip
