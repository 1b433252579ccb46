"""A folder of captioned clips as a source: native sizes, nothing resized, and no file lost without a word.

    clips/
      cat.mp4  cat.txt            a caption beside its clip,
      sub/dog.webm  photo.png     or in one table at the top:
      captions.jsonl              {"file": "sub/dog.webm", "caption": "a dog runs"} a line, or
      captions.csv                a header line `file,caption`, then rows

A file becomes a clip by two cuts only: its first 1 + 4k frames, as many as there are up to `max_frames`, and a centre
crop of less than one `cell` of height and of width. A file that cannot become a clip is skipped, counted by reason and
named in a `SkipReport`; it never stops a run (unless `strict`).
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from minisora_jax.data.atomic import replacing
from minisora_jax.data.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES, VideoError, probe, read_clip_frames
from minisora_jax.types import Clip

PREPROCESSING_VERSION = 1  # of the pixels a file turns into; caches remember it
TABLES = ("captions.jsonl", "captions.csv")
NAMES_SHOWN = 5  # of each reason, in a summary


class BadClip(ValueError):
    """A file that cannot become a clip. `reason` is a fixed phrase to count by, `detail` has the numbers."""

    def __init__(self, name: str, reason: str, detail: str = ""):
        super().__init__(f"{name}: {reason}" + (f" ({detail})" if detail else ""))
        self.name, self.reason, self.detail = name, reason, detail

    def __reduce__(self):
        return BadClip, (self.name, self.reason, self.detail)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A file that its header says will become a clip."""

    name: str  # path within the folder, with forward slashes
    path: Path
    caption: str
    frames: int  # by the header; 0 where it does not say


class SkipReport:
    """What was kept and what was not, and why. `skipped` has one {"name", "reason", "detail"} a skipped file."""

    def __init__(self, strict: bool = False):
        self.kept = 0
        self.skipped: list[dict[str, str]] = []
        self.shortened: list[str] = []  # kept, but longer than max_frames
        self.strict = strict

    def add(self, name: str, reason: str, detail: str = "") -> None:
        """Record a skipped file; BadClip if strict."""
        if self.strict:
            raise BadClip(name, reason, detail)
        self.skipped.append({"name": name, "reason": reason, "detail": detail})

    @property
    def counts(self) -> dict[str, int]:
        """Skipped files by reason, the most frequent first."""
        return dict(collections.Counter(row["reason"] for row in self.skipped).most_common())

    def summary(self) -> str:
        """'9 clips kept, 3 skipped: 2 no caption (a.mp4, b.mp4); 1 truncated (c.mp4)'."""
        reasons = []
        for reason, count in self.counts.items():
            names = [row["name"] for row in self.skipped if row["reason"] == reason]
            more = f", and {count - NAMES_SHOWN} more" if count > NAMES_SHOWN else ""
            reasons.append(f"{count} {reason} ({', '.join(names[:NAMES_SHOWN])}{more})")
        text = f"{self.kept} clips kept, {len(self.skipped)} skipped"
        text += f": {'; '.join(reasons)}" if reasons else ""
        return text + (f". {len(self.shortened)} cut to their first frames" if self.shortened else "")

    def write(self, path: str | os.PathLike) -> None:
        """One skipped file a line, as JSON."""
        with replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in self.skipped), encoding="utf-8")


class Folder:
    """The clips of a folder, decoded on demand: `folder[i]` is a Clip or raises BadClip; `clips()` yields the good.

    cell: pixels; height and width become multiples of it (the codec's factor times the patch).
    max_frames: 1 + 4k; longer files give their first frames.   max_pixels: height * width of the largest frame taken.
    need_caption: False keeps files without a caption, as "" (a codec needs none).   strict: raise instead of skip.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        cell: int = 8,
        max_frames: int = 121,
        max_pixels: int = 4096 * 4096,
        need_caption: bool = True,
        strict: bool = False,
    ):
        if cell < 1 or max_pixels < cell * cell:
            raise ValueError(f"cell={cell} must be at least 1, and max_pixels={max_pixels} at least one cell")
        if max_frames != clip_length(max_frames):
            low = clip_length(max_frames) if max_frames > 0 else 1
            raise ValueError(f"max_frames={max_frames} must be 1 + 4*k; use {low} or {low + 4}")
        self.path, self.cell, self.max_frames = Path(path), cell, max_frames
        self.entries, self.report = scan(
            path, cell=cell, max_frames=max_frames, max_pixels=max_pixels, need_caption=need_caption, strict=strict
        )

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, i: int) -> Clip:
        entry = self.entries[i]
        try:
            frames, fps = read_clip_frames(entry.path, max_frames=self.max_frames)
        except VideoError as error:
            raise BadClip(entry.name, error.reason, error.detail) from error
        if min(frames.shape[1:3]) < self.cell:  # the header may have said otherwise
            raise BadClip(entry.name, "too small", f"frames of {frames.shape[1:3]}, cells of {self.cell}")
        frames = crop_to_cells(frames[: clip_length(len(frames))], self.cell)
        return Clip(np.ascontiguousarray(frames), entry.caption, fps, entry.name)

    def clips(self) -> Iterator[Clip]:
        """Every clip that decodes, in order of name; the others go to `report`."""
        for i in range(len(self)):
            try:
                clip = self[i]
            except BadClip as bad:
                self.report.add(bad.name, bad.reason, bad.detail)
                continue
            self.report.kept += 1
            yield clip


def clip_length(frames: int) -> int:
    """The longest 1 + 4k within `frames`."""
    return 1 + 4 * ((frames - 1) // 4)


def crop_to_cells(frames_THWC: np.ndarray, cell: int) -> np.ndarray:
    """The centre of each frame, height and width lowered to multiples of `cell`. A view."""
    H, W = frames_THWC.shape[1:3]
    top, left = H % cell // 2, W % cell // 2
    return frames_THWC[:, top : top + H // cell * cell, left : left + W // cell * cell]


# ---- Looking through a folder, by headers only


def scan(
    folder: str | os.PathLike,
    *,
    cell: int = 8,
    max_frames: int = 121,
    max_pixels: int = 4096 * 4096,
    need_caption: bool = True,
    strict: bool = False,
) -> tuple[list[Entry], SkipReport]:
    """The files of a folder and its subfolders that can become clips as far as headers tell, and the others."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder of clips")
    report, entries = SkipReport(strict), []
    files = _files(folder)
    captions = _read_tables(folder, report)
    used = {name for name in files if Path(name).suffix.lower() == ".txt"} & {_beside(n) for n in files}
    for name in files:
        path = folder / name
        if name in used or name in TABLES:
            continue
        if path.suffix.lower() not in VIDEO_SUFFIXES + IMAGE_SUFFIXES:
            kind = "caption without a clip" if path.suffix.lower() == ".txt" else "unknown suffix"
            report.add(name, kind)
            continue
        try:
            caption = _caption(folder, name, captions, need_caption)
            info = probe(path)
            if min(info.height, info.width) < cell:
                raise BadClip(name, "too small", f"{info.height}x{info.width} pixels, cells of {cell}")
            if info.height * info.width > max_pixels:
                raise BadClip(name, "too large", f"{info.height}x{info.width} pixels, at most {max_pixels}")
        except VideoError as error:
            report.add(name, error.reason, error.detail)
        except BadClip as bad:
            report.add(name, bad.reason, bad.detail)
        else:
            entries.append(Entry(name, path, caption, info.frames))
            if info.frames > max_frames:
                report.shortened.append(name)
    for name in sorted(set(captions) - set(files)):
        report.add(name, "caption without a clip", "its row in the caption table names no file")
    return entries, report


def _files(folder: Path) -> list[str]:
    """Names of all files under a folder, sorted; hidden ones apart. A folder called x.mp4 counts as a (bad) file."""
    names = []
    for top, folders, files in os.walk(folder):
        odd = [d for d in folders if Path(d).suffix.lower() in VIDEO_SUFFIXES + IMAGE_SUFFIXES]
        folders[:] = [d for d in folders if d not in odd and not d.startswith(".")]
        names += [(Path(top) / f).relative_to(folder).as_posix() for f in files + odd if not f.startswith(".")]
    return sorted(names)


def _beside(name: str) -> str:
    """The caption file of a clip; itself for a caption file that describes none."""
    path = Path(name)
    return path.with_suffix(".txt").as_posix() if path.suffix.lower() in VIDEO_SUFFIXES + IMAGE_SUFFIXES else ""


def _caption(folder: Path, name: str, captions: dict[str, str], needed: bool) -> str:
    """A clip's caption, its white space single spaces. Bytes that are not UTF-8 arrive here as surrogates."""
    beside = folder / _beside(name)
    if beside.is_file():
        text = beside.read_bytes().decode("utf-8-sig", "surrogateescape")
    elif name in captions:
        text = captions[name]
    elif needed:
        raise BadClip(name, "no caption", f"neither {beside.name} nor a row of {' or '.join(TABLES)}")
    else:
        return ""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadClip(name, "caption not UTF-8", f"at character {error.start}") from error
    text = " ".join(text.split())
    if needed and not text:
        raise BadClip(name, "empty caption")
    return text


def _read_tables(folder: Path, report: SkipReport) -> dict[str, str]:
    """File name -> caption from the tables of a folder. Rows that say neither are reported, by line."""
    captions = {}
    for table in TABLES:
        if not (folder / table).is_file():
            continue
        text = (folder / table).read_bytes().decode("utf-8-sig", "surrogateescape")
        rows = _jsonl_rows(text) if table.endswith("jsonl") else csv.DictReader(io.StringIO(text, newline=""))
        for number, row in enumerate(rows, 1):
            if isinstance(row, dict) and isinstance(row.get("file"), str) and isinstance(row.get("caption"), str):
                captions.setdefault(Path(row["file"]).as_posix(), row["caption"])
            else:
                report.add(f"{table}:{number}", "bad caption row", "it needs 'file' and 'caption', both text")
    return captions


def _jsonl_rows(text: str) -> Iterator[dict | None]:
    for line in filter(str.strip, text.split("\n")):
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            yield None
