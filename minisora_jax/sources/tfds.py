"""TensorFlow Datasets as a source, without TensorFlow (`uv sync --extra tfds`).

    tfds:video_clips:train                             below ~/tensorflow_datasets, the newest version
    tfds:bridge/config:2.0.0:train[:10%]?data_dir=/data&fps=5&media=steps/observation/image_0
    tfds:/data/bridge/2.0.0:train?fps=5                the directory itself

One feature of an example is the clip, and another its caption. `find_features` finds them by types and names;
"?media=PATH" and "?caption=PATH" choose them. The caption may be a ClassLabel, as of ImageNet; its name is taken then.

    Text (a file's bytes)              VideoClips of sources/tfds_builder.py, and sets like it
    Video, Sequence(Image), Tensor     frames
    Dataset of steps with an Image     RLDS: an episode is a clip, its language instruction the caption
    Image                              a clip of one frame

Images stay encoded until this package's own decoder reads them. TFDS's `Video` feature needs TensorFlow. Its records
equal those of Sequence(Image), so they are read as such. ArrayRecord files go through TFDS's data source, and TFRecord
files through the index below.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from minisora_jax.io.concat_index import ConcatIndex
from minisora_jax.io.filesystem import File, find
from minisora_jax.media.video import VideoError
from minisora_jax.sources.base import Media, reopened
from minisora_jax.sources.captions import clean_caption
from minisora_jax.sources.skips import BadClip, SkipReport
from minisora_jax.sources.tfds_features import (
    builder_of,
    class_names,
    find_features,
    import_tfds,
    texts_of,
    undecoded,
    value_of,
)

VERSION = re.compile(r"\d+\.\d+\.\d+")


class Tfds:
    """A split of a TFDS data set. Captions are in the records, so a missing caption shows only when a clip is read.

    Args:
        directory: the folder of one version of the data set.
        media: the path of the clip's feature, such as "steps/observation/image"; "" finds it.
        caption: the path of the caption's feature; "" finds it.
        fps: frames per second, for data sets that do not store it; "" for those that do.

    Raises:
        ValueError: several features fit, the split is unknown, or there is no frame rate.
    """

    actions = ()

    def __init__(
        self,
        directory: str,
        split: str,
        media: str = "",
        caption: str = "",
        fps: str = "",
        *,
        need_caption: bool = True,
        strict: bool = False,
    ):
        self.report, self.need_caption = SkipReport(strict), need_caption
        self.arguments: dict[str, str | bool] = {
            "directory": directory,
            "split": split,
            "media": media,
            "caption": caption,
            "fps": fps,
            "need_caption": need_caption,
        }
        self.split = split
        builder = builder_of(directory)
        try:
            instructions = builder.info.splits[split].file_instructions
        except (KeyError, ValueError) as error:
            raise ValueError(f"{directory} has the splits {', '.join(builder.info.splits)}, not {split!r}") from error
        features = builder.info.features
        self.clip, self.caption, self.rate = find_features(features, directory, media, caption, need_caption)
        self.classes = class_names(features, self.caption)
        self.fps = _rate(fps) if fps else None
        if self.clip.kind in ("frames", "tensor", "steps") and not (self.rate or self.fps):
            raise ValueError(f"{directory} has no feature with the frames per second: add '?fps=10', for example")
        self.examples = _examples(builder, split, instructions, directory)
        shards = [find(instruction.filename)[0] for instruction in instructions]
        metadata = [[file.url.rpartition("/")[2], file.size, file.version] for file in shards]
        metadata = json.dumps([metadata, {k: v for k, v in self.arguments.items() if k != "directory"}])
        self.identity = f"tfds:{hashlib.sha256(metadata.encode('utf-8')).hexdigest()}"

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> Media:
        name = f"{self.split}-{i:08d}"
        try:
            example = self.examples[i]
        except (IndexError, OSError):  # the index or the storage is at fault, not the record
            raise
        except Exception as error:  # a damaged record raises errors of protobuf, ArrayRecord or TFDS
            return Media(name, "", VideoError("corrupt record", f"example {i}: {type(error).__name__}: {error}"))
        if self.clip.named:
            name = example["name"].decode("utf-8", "backslashreplace")
        rate = self.fps or (float(value_of(example, self.rate)) if self.rate else None) or None
        try:
            caption = self._caption(name, example)
            return Media(name, caption, self.clip.read(example), rate)
        except VideoError as error:
            return Media(name, "", error, rate)

    def _caption(self, name: str, example: dict) -> str:
        texts = texts_of(example, self.caption) if self.caption else ()
        if self.classes:
            number = int(next(iter(texts), -1))
            if not 0 <= number < len(self.classes):
                raise VideoError("no class", f"{'/'.join(self.caption)} is {number}, of {len(self.classes)} classes")
            return self.classes[number]
        text = next(filter(bytes.strip, texts), b"")
        try:
            return clean_caption(name, text.decode("utf-8", "surrogateescape"), self.need_caption)
        except BadClip as bad:
            raise VideoError(bad.reason, bad.detail or f"in {'/'.join(self.caption)}") from bad

    def __reduce__(self):
        *where, need_caption = self.arguments.values()
        return reopened, (Tfds, tuple(where), need_caption, self.identity)


def open_tfds(
    spec: str,
    *,
    data_dir: str = "",
    media: str = "",
    caption: str = "",
    fps: str = "",
    need_caption: bool = True,
    strict: bool = False,
) -> Tfds:
    """The source of tfds:NAME[/CONFIG][:VERSION]:SPLIT or tfds:DIRECTORY:SPLIT; `Tfds` explains the arguments.

    Args:
        data_dir: the folder of data sets; "" for TFDS's own, ~/tensorflow_datasets.

    Raises:
        ValueError: the name has another form.
        FileNotFoundError: there is no such data set or version.
    """
    match = re.fullmatch(r"tfds:(.+?)(?::(\d+\.\d+\.\d+))?:(\w[^:]*(?:\[[^\]]*\])?)", spec)
    if not match:
        raise ValueError(
            f"{spec!r} must look like tfds:NAME:SPLIT or tfds:NAME/CONFIG:1.0.0:SPLIT, as tfds:bridge:train"
        )
    name, version, split = match.groups()
    directory = _directory(import_tfds(), name, version, data_dir)
    return Tfds(directory, split, media, caption, fps, need_caption=need_caption, strict=strict)


def _directory(tfds: ModuleType, name: str, version: str | None, data_dir: str) -> str:
    """The folder of a data set: DATA_DIR/NAME/CONFIG/VERSION; the newest version if `version` is None."""
    from etils import epath

    directory = epath.Path(name).expanduser()
    if (directory / "dataset_info.json").exists():
        return os.fspath(directory)
    top = epath.Path(data_dir or tfds.core.constants.DATA_DIR).expanduser() / name
    names = [p.name for p in top.iterdir() if p.is_dir()] if top.is_dir() else []
    versions = sorted((p for p in names if VERSION.fullmatch(p)), key=lambda v: [*map(int, v.split("."))])
    if versions and (version is None or version in versions):
        return os.fspath(top / (version or versions[-1]))
    content = f"it has {', '.join(sorted(names))}" if names else "it is empty or missing"
    raise FileNotFoundError(
        f"there is no data set {name}{f' of version {version}' if version else ''} in {top}: {content}. "
        "Name the folder of data sets by '?data_dir=DIR'. A configuration is part of the name, as in NAME/CONFIG"
    )


# ---- Examples


class Examples(Protocol):
    """The examples of a split, in order."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> dict: ...


def _examples(builder: Any, split: str, instructions: list, where: str) -> Examples:
    decoders = undecoded(builder.info.features)
    kind = builder.info.file_format.value
    if kind == "array_record":
        return builder.as_data_source(split=split, decoders=decoders)
    if kind == "tfrecord":
        return TFRecords(instructions, builder.info.features, decoders)
    raise ValueError(f"{where} is a data set of {kind} files; array_record and tfrecord are read")


class TFRecords:
    """The examples of TFRecord files. A record is: length, checksum of the length, bytes, checksum of the bytes.

    A file is indexed when its first example is read. Checksums are not verified, since damage also breaks the images or
    the protocol buffer around them.
    """

    def __init__(self, instructions: list, features: Any, decoders: dict):
        self.instructions, self.features, self.decoders = instructions, features, decoders
        self.concat_index = ConcatIndex(instruction.take for instruction in instructions)
        self.places: dict[int, np.ndarray] = {}  # file number -> (n, 2): first byte and length of each record
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.concat_index)

    def __getitem__(self, i: int) -> dict:
        number, at = self.concat_index.locate(i)
        instruction = self.instructions[number]
        file = find(instruction.filename)[0]
        with self.lock:
            if number not in self.places:
                self.places[number] = np.array(list(_records(file)), np.int64).reshape(-1, 2)
        places, at = self.places[number], at + instruction.skip
        if at >= len(places):
            raise ValueError(
                f"{file.url} has {len(places)} whole records of {instruction.examples_in_shard}: it is truncated"
            )
        start, size = map(int, places[at])
        return self.features.deserialize_example_np(file.read(start, start + size), decoders=self.decoders)


def _records(file: File) -> Iterator[tuple[int, int]]:
    """(first byte, length) of each whole record of a TFRecord file."""
    with file.open() as opened:
        at = 0
        while len(head := opened.read(12)) == 12:
            (size,) = struct.unpack("<Q", head[:8])
            if at + 16 + size > file.size:
                return
            yield at + 12, size
            at += 16 + size
            opened.seek(at)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise ValueError(f"fps={text} must be a number above 0")
    return rate
