"""`minisora prepare`: decode and check every clip once, so that trainings meet only good ones.

    folder of files, or "shapes"  ->  clips-00000-of-0000N.array_record, sizes.npy, manifest.json

Pixels are kept exactly (zstd). What was skipped, and why, is in the manifest.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from minisora_jax.data.files import is_url
from minisora_jax.data.records import DataError, Item, Shards, pack_record, sha256, write_shards
from minisora_jax.data.shapes import Shapes
from minisora_jax.data.sources import PREPROCESSING_VERSION, SkipReport, Source, open_source
from minisora_jax.data.stages import Drop, Sizes, decode
from minisora_jax.types import Clip


def prepare(
    source: str | os.PathLike,
    out_dir: str | os.PathLike,
    *,
    count: int = 1024,
    split: str = "train",
    cell: int = 8,
    max_frames: int = 121,
    max_pixels: int = 4096 * 4096,
    need_caption: bool = True,
    strict: bool = False,
    shard_bytes: int = 256 * 2**20,
) -> SkipReport:
    """Write the good clips of `source` to `out_dir`, and say what was skipped.

    source: what `open_source` knows, such as a folder; "shapes" is `count` procedural clips of `split`. An interrupted
    run, started again, keeps its finished shards. DataError if `out_dir` holds another data set, or no clip is good.
    """
    spec = f"shapes:{split}:{count}" if str(source) == "shapes" else source
    clips = open_source(spec, need_caption=need_caption, strict=strict)
    report, sizes = clips.report, Sizes(cell, max_frames, max_pixels)
    manifest = write_shards(
        out_dir,
        "clips",
        lambda state: _items(clips, sizes, report, state),
        settings={
            "preprocessing_version": PREPROCESSING_VERSION,
            "source": clips.identity,
            "need_caption": need_caption,
            **dataclasses.asdict(sizes),
        },
        closing=lambda: {"skipped": report.skipped, "shortened": report.shortened},
        shard_bytes=shard_bytes,
        options="group_size:1,zstd:1",
    )
    report.kept, report.skipped, report.shortened = manifest["records"], manifest["skipped"], manifest["shortened"]
    return report


class Records:
    """A prepared data set as a sequence of clips. `sizes` (n, 4): T, H, W, and the caption's length in bytes."""

    def __init__(self, directory: str | os.PathLike):
        self.shards = Shards(directory, "clips", {"preprocessing_version": PREPROCESSING_VERSION})
        self.sizes: np.ndarray = self.shards.sizes

    def __len__(self) -> int:
        return len(self.shards)

    @property
    def identity(self) -> str:
        """A hash of the data set: of its manifest, which has the sha256 of everything else."""
        return sha256(self.shards.directory / "manifest.json")

    def __getitem__(self, i: int) -> Clip:
        arrays, facts = self.shards.read(i)
        return Clip(arrays["frames"], facts["caption"], facts["fps"], facts["name"])


def _items(clips: Source, sizes: Sizes, report: SkipReport, state: dict[str, Any] | None) -> Iterator[Item]:
    """Records of the clips from where `state` left off; it carries what decoding had skipped until then."""
    start, skipped, shortened = (state["next"], state["skipped"], state["shortened"]) if state else (0, [], [])
    scanned = len(report.skipped)  # found again by every scan
    report.skipped += skipped
    report.shortened += shortened
    for i in tqdm(range(start, len(clips)), initial=start, total=len(clips), desc="clips", disable=None):
        clip = decode(clips[i], sizes)
        if isinstance(clip, Drop):
            report.add(clip.name, clip.reason, clip.detail, clip.stage)
            continue
        if clip.shortened:
            report.shortened.append(clip.name)
        report.kept += 1
        facts = {"caption": clip.caption, "fps": clip.fps, "name": clip.name, "source": clip.source}
        size = (*clip.frames_THWC.shape[:3], len(clip.caption.encode("utf-8")))
        state = {"next": i + 1, "skipped": report.skipped[scanned:], "shortened": report.shortened}
        yield Item(pack_record({"frames": clip.frames_THWC}, facts), size, state)
    if not report.kept and not start:
        raise DataError(f"no good clip: {report.summary()}")


def open_clips(spec: str) -> Sequence[Clip]:
    """Clips by name: "shapes", "shapes:heldout" or "shapes:train:5000", or a directory that `prepare` wrote."""
    if spec.split(":")[0] == "shapes":
        _, split, count, *_ = [*spec.split(":"), "", ""]
        if count and not count.isdigit():
            raise ValueError(f"{spec!r}: the count of clips must be a whole number, as in shapes:train:5000")
        return Shapes(split or "train", int(count or 100_000))
    if not is_url(spec) and not os.path.exists(os.path.join(spec, "manifest.json")):
        raise FileNotFoundError(f"{spec} is not a prepared data set: run `minisora prepare CLIPS_FOLDER {spec}` first")
    return Records(spec)


class Part(Sequence):
    """clips[start:stop] without reading any."""

    def __init__(self, clips: Sequence[Clip], start: int, stop: int):
        self.clips, self.range = clips, range(start, stop)

    def __len__(self) -> int:
        return len(self.range)

    def __getitem__(self, i: int) -> Clip:
        return self.clips[self.range[i]]


def hold_out(clips: Sequence[Clip], share: float = 1 / 16) -> tuple[Sequence[Clip], Sequence[Clip]]:
    """(for training, held out): the last clips of a data set, at least one, are kept for evaluation."""
    if len(clips) < 2:
        raise DataError(f"{len(clips)} clips: at least 2 are needed to train on some and hold some out")
    cut = len(clips) - max(1, round(share * len(clips)))
    return Part(clips, 0, cut), Part(clips, cut, len(clips))
