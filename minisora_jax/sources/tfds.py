"""TensorFlow Datasets as a source, without TensorFlow (`pip install 'minisora_jax[tfds]'`).

    tfds:video_clips:train                             below ~/tensorflow_datasets, the newest version
    tfds:bridge/config:2.0.0:train[:10%]?data_dir=/data&fps=5&media=steps/observation/image_0
    tfds:/data/bridge/2.0.0:train?fps=5                the directory itself

Of each example one feature is the clip, and one its caption; `choose` tells them by types and names, "?media=" and
"?caption=" by their paths:

    Text (a file's bytes)              VideoClips of sources/tfds_builder.py, and sets like it
    Video, Sequence(Image), Tensor     frames
    Dataset of steps with an Image     RLDS: an episode is a clip, its language instruction the caption
    Image                              a clip of one frame

Images stay encoded until ours decodes them. `Video` cannot be made without TensorFlow, but its records are those of
Sequence(Image), and so it is read. Sets of ArrayRecord go through TFDS's data source, TFRecord through our index.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import threading
from collections.abc import Iterator, Sequence

import numpy as np

from minisora_jax.io.concat_index import ConcatIndex
from minisora_jax.io.filesystem import find
from minisora_jax.io.video import VideoError
from minisora_jax.sources.base import BadClip, Media, SkipReport, clean_caption, reopened
from minisora_jax.sources.tfds_features import builder_of, choose, import_tfds, texts_of, undecoded, value_of

VERSION = re.compile(r"\d+\.\d+\.\d+")


class Tfds:
    """A split of a TFDS data set. Captions are inside the records, so a clip that has none is known when it is read.

    media, caption: paths of features, such as "steps/observation/image"; "" finds out.   fps: of frames whose data set
    does not say it.   ValueError where the features leave a choice, or there is no rate.
    """

    def __init__(self, directory: str, split: str, media="", caption="", fps="", *, need_caption=True, strict=False):
        self.report, self.need_caption = SkipReport(strict), need_caption
        self.arguments = {"directory": directory, "split": split, "media": media, "caption": caption, "fps": fps}
        self.arguments["need_caption"] = need_caption
        self.split = split
        builder = builder_of(directory)
        try:
            instructions = builder.info.splits[split].file_instructions
        except (KeyError, ValueError) as error:
            raise ValueError(f"{directory} has the splits {', '.join(builder.info.splits)}, not {split!r}") from error
        self.clip, self.caption, self.rate = choose(builder.info.features, directory, media, caption, need_caption)
        self.fps = _rate(fps) if fps else None
        if self.clip.kind in ("frames", "tensor", "steps") and not (self.rate or self.fps):
            raise ValueError(f"{directory} does not say how many frames a second it has: add '?fps=10', for example")
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
        except (IndexError, OSError):  # not the record's fault
            raise
        except Exception as error:  # protobuf's, ArrayRecord's, TFDS's own, whatever is broken
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
        text = next(filter(bytes.strip, texts), b"")
        try:
            return clean_caption(name, text.decode("utf-8", "surrogateescape"), self.need_caption)
        except BadClip as bad:
            raise VideoError(bad.reason, bad.detail or f"in {'/'.join(self.caption)}") from bad

    def __reduce__(self):
        *where, need_caption = self.arguments.values()
        return reopened, (Tfds, tuple(where), need_caption, self.identity)


def open_tfds(spec: str, *, data_dir="", media="", caption="", fps="", need_caption=True, strict=False) -> Tfds:
    """tfds:NAME[/CONFIG][:VERSION]:SPLIT, or tfds:DIRECTORY:SPLIT."""
    match = re.fullmatch(r"tfds:(.+?)(?::(\d+\.\d+\.\d+))?:(\w[^:]*(?:\[[^\]]*\])?)", spec)
    if not match:
        raise ValueError(
            f"{spec!r} must look like tfds:NAME:SPLIT or tfds:NAME/CONFIG:1.0.0:SPLIT, as tfds:bridge:train"
        )
    name, version, split = match.groups()
    directory = _directory(import_tfds(), name, version, data_dir)
    return Tfds(directory, split, media, caption, fps, need_caption=need_caption, strict=strict)


def _directory(tfds, name: str, version: str | None, data_dir: str) -> str:
    """Where the data set lies: DATA_DIR/NAME/CONFIG/VERSION, of the newest version unless one is asked for."""
    from etils import epath

    here = epath.Path(name).expanduser()
    if (here / "dataset_info.json").exists():
        return os.fspath(here)
    top = epath.Path(data_dir or tfds.core.constants.DATA_DIR).expanduser() / name
    found = [p.name for p in top.iterdir() if p.is_dir()] if top.is_dir() else []
    versions = sorted((p for p in found if VERSION.fullmatch(p)), key=lambda v: [*map(int, v.split("."))])
    if versions and (version is None or version in versions):
        return os.fspath(top / (version or versions[-1]))
    there = f"it has {', '.join(sorted(found))}" if found else "nothing is there"
    raise FileNotFoundError(
        f"there is no data set {name}{f' of version {version}' if version else ''} in {top}: {there}. "
        "Say where by '?data_dir=DIR'; a configuration is part of the name, as in NAME/CONFIG"
    )


# ---- Examples


def _examples(builder, split: str, instructions: list, where: str) -> Sequence[dict]:
    decoders = undecoded(builder.info.features)
    kind = builder.info.file_format.value
    if kind == "array_record":
        return builder.as_data_source(split=split, decoders=decoders)
    if kind == "tfrecord":
        return TFRecords(instructions, builder.info.features, decoders)
    raise ValueError(f"{where} is a data set of {kind} files; array_record and tfrecord are read")


class TFRecords:
    """The records of TFRecord files: length, its checksum, bytes, their checksum. Places are found file by file, at the
    first need. The checksums are left alone: images, and the protocol buffer around them, have their own structure."""

    def __init__(self, instructions: list, features, decoders):
        self.instructions, self.features, self.decoders = instructions, features, decoders
        self.concat_index = ConcatIndex(instruction.take for instruction in instructions)
        self.places: dict[int, np.ndarray] = {}  # of each file (n, 2): where a record begins, and its bytes
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
                f"{file.url} has {len(places)} whole records of {instruction.examples_in_shard}: it is cut"
            )
        start, size = map(int, places[at])
        return self.features.deserialize_example_np(file.read(start, start + size), decoders=self.decoders)


def _records(file) -> Iterator[tuple[int, int]]:
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
