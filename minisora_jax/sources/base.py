"""Sources of clips: a source is a sequence of `Media`, which are undecoded files with their captions.

    clips/
      cat.mp4  cat.txt            a folder: a caption beside its clip,
      sub/dog.webm  photo.png     or in one table at the top:
      captions.jsonl              {"file": "sub/dog.webm", "caption": "a dog runs"} a line, or
      captions.csv                a header line `file,caption`, then rows
      metadata.jsonl, .csv        Hugging Face's image and video folders: `file_name` and `text`, in any subfolder
    shapes:train:5000             the procedural clips of toy/shapes.py
    clips.tar, gs://..., ...      docs/sources.md lists them all

`spec.open_source` opens a source by its name. A source skips files that cannot become clips. A `SkipReport` names them
and counts them by reason; they stop a run only if `strict`. `prepare` decodes the clips; this module does not.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import functools
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from minisora_jax.io.atomic import write_text
from minisora_jax.io.filesystem import json_or_none
from minisora_jax.media.video import IMAGE_SUFFIXES, STILL_FPS, VIDEO_SUFFIXES, VideoError, VideoInfo, probe

PREPROCESSING_VERSION = 1  # changes when the same file gives other pixels; caches store it
TABLES = ("captions.jsonl", "captions.csv")  # caption tables at the top of a folder
METADATA = ("metadata.jsonl", "metadata.csv")  # caption tables in any folder, about the files in it
CAPTION_KEYS = ("caption", "text", "prompt", "description")  # keys of a table or a .json; the first present one counts
NAMES_SHOWN = 5  # names that a summary lists for each reason


class BadClip(ValueError):
    """A file cannot become a clip. `reason` is a fixed phrase for counting, `detail` has the numbers."""

    def __init__(self, name: str, reason: str, detail: str = ""):
        super().__init__(f"{name}: {reason}" + (f" ({detail})" if detail else ""))
        self.name, self.reason, self.detail = name, reason, detail

    def __reduce__(self):
        return BadClip, (self.name, self.reason, self.detail)


@dataclasses.dataclass(frozen=True)
class Media:
    """An undecoded clip and its caption ("" for none)."""

    name: str  # unique within its source; a path within a folder has forward slashes
    caption: str
    data: Path | bytes | np.ndarray | VideoError  # a file, its bytes, uint8 RGB frames (T, H, W, 3), or the failure
    fps: float | None = None  # frames per second; None: the file states it. Frames need it if T > 1

    @property
    def content(self) -> Path | bytes | np.ndarray:
        """The data; raises its VideoError if there is none."""
        data = self.data
        if isinstance(data, Exception):
            raise data
        return data


class Source(Protocol):
    """A sequence of Media. It pickles into few bytes, so a worker gets (source, range of indices)."""

    identity: str  # a fingerprint of the contents
    report: SkipReport  # the files that the source's own scan skipped

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Media: ...


class SkipReport:
    """The count of kept clips, and the list `skipped` of {"name", "stage", "reason", "detail"}."""

    def __init__(self, strict: bool = False):
        self.kept = 0
        self.skipped: list[dict[str, str]] = []
        self.shortened = 0  # kept clips that were cut to max_frames
        self.strict = strict

    def add(self, name: str, reason: str, detail: str = "", stage: str = "scan") -> None:
        """Add a skipped file, with the stage that skipped it; BadClip if strict."""
        if self.strict:
            raise BadClip(name, reason, detail)
        self.skipped.append({"name": name, "stage": stage, "reason": reason, "detail": detail})

    @property
    def counts(self) -> dict[str, int]:
        """Skipped files by reason, the most frequent first."""
        return dict(collections.Counter(row["reason"] for row in self.skipped).most_common())

    def summary(self) -> str:
        """One line, such as '9 clips kept, 3 skipped: 2 no caption (a.mp4, b.mp4); 1 truncated (c.mp4)'."""
        reasons = []
        for reason, count in self.counts.items():
            names = [row["name"] for row in self.skipped if row["reason"] == reason]
            more = f", and {count - NAMES_SHOWN} more" if count > NAMES_SHOWN else ""
            reasons.append(f"{count} {reason} ({', '.join(names[:NAMES_SHOWN])}{more})")
        text = f"{self.kept} clips kept, {len(self.skipped)} skipped"
        text += f": {'; '.join(reasons)}" if reasons else ""
        return text + (f". {self.shortened} cut to their first frames" if self.shortened else "")

    def write(self, path: str | os.PathLike) -> None:
        """Write the skipped files as JSON lines."""
        write_text(path, "".join(json.dumps(row) + "\n" for row in self.skipped))


# ---- Procedural clips


class ProceduralShapes:
    """The clips of toy/shapes.py as a source, drawn on demand.

    Args:
        spec: "shapes[:SPLIT[:COUNT]]"; the defaults are train and 1024.
    """

    def __init__(self, spec: str = "shapes"):
        from minisora_jax.toy.shapes import Shapes

        self.clips = Shapes.from_spec(spec, 1024)
        self.identity, self.report = f"shapes:{self.clips.split}:{len(self.clips)}", SkipReport()

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, i: int) -> Media:
        clip = self.clips[i]
        return Media(clip.name, clip.caption, clip.frames_THWC, clip.fps)


# ---- A folder


class Folder:
    """The videos and images of a folder and its subfolders, sorted by name. Opening does not read them.

    A pickled Folder is its path. Each process that unpickles it lists the folder again and checks that the contents are
    the same.

    Args:
        need_caption: skip clips without a caption.
        strict: raise BadClip instead of skipping.

    Raises:
        FileNotFoundError: the path is no folder.
    """

    def __init__(self, path: str | os.PathLike, *, need_caption: bool = True, strict: bool = False):
        self.path, self.need_caption = Path(path), need_caption
        if not self.path.is_dir():
            raise FileNotFoundError(f"{path} is not a folder of clips")
        self.report = SkipReport(strict)
        self.entries: list[tuple[str, str]] = _scan(self.path, need_caption, self.report)  # (name, caption)
        metadata = (f.stat() if (f := self.path / name).exists() else f.lstat() for name, _ in self.entries)
        rows = ([name, caption, s.st_size, s.st_mtime_ns] for (name, caption), s in zip(self.entries, metadata))
        digest = hashlib.sha256()
        for row in rows:
            digest.update(json.dumps(row).encode("utf-8"))
        self.identity = f"folder:{digest.hexdigest()}"

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, i: int) -> Media:
        name, caption = self.entries[i]
        return Media(name, caption, self.path / name)

    def __reduce__(self):
        return reopened, (Folder, (str(self.path.resolve()),), self.need_caption, self.identity)


@functools.lru_cache(maxsize=8)
def reopened(kind: type, where: tuple, need_caption: bool, identity: str) -> Source:
    """Unpickle a source that is stored as its place: kind(*where), once a process.

    Raises:
        RuntimeError: the contents have changed, so the identity differs.
    """
    source = kind(*where, need_caption=need_caption)
    if source.identity != identity:
        raise RuntimeError(f"{where[0]} has changed since this run began: expected {identity}, found {source.identity}")
    return source


def _scan(folder: Path, need_caption: bool, report: SkipReport) -> list[tuple[str, str]]:
    return scan_names(_files(folder), lambda name: (folder / name).read_bytes(), need_caption, report)


def scan_names(
    files: list[str], read: Callable[[str], bytes], need_caption: bool, report: SkipReport, *, samples: bool = False
) -> list[tuple[str, str]]:
    """(name, caption) of the files that are clips by their suffix and have a caption. Other files go to the report.

    Args:
        files: all names, with forward slashes.
        read: reads the bytes of a file; called for captions and tables only.
        need_caption: skip clips without a caption.
        samples: files with the same name up to the first dot are one sample (webdataset), so a.mp4 and a.front.mp4
            may share a.txt.
    """
    entries, known = [], set(files)
    captions = _read_tables(files, read, report)
    used = {beside for name in files for beside in _beside(name, samples)} & known
    for name in files:
        suffix = Path(name).suffix.lower()
        if name in used or name in TABLES or Path(name).name in METADATA:
            continue
        if suffix not in VIDEO_SUFFIXES + IMAGE_SUFFIXES:
            report.add(name, "caption without a clip" if suffix == ".txt" else "unknown suffix")
            continue
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            report.add(ascii(name)[1:-1], "name not UTF-8")
            continue
        try:
            beside = [other for other in _beside(name, samples) if other in known]
            entries.append((name, _caption(name, beside, read, captions, need_caption)))
        except BadClip as bad:
            report.add(bad.name, bad.reason, bad.detail)
        except OSError as error:
            report.add(name, "unreadable caption", str(error))
    for name in sorted(set(captions) - known):
        report.add(name, "caption without a clip", "its row in the caption table names no file")
    return entries


def _files(folder: Path) -> list[str]:
    """The names of all visible files under a folder, sorted. A folder called x.mp4 counts as a (bad) file."""
    names = []
    for top, folders, files in os.walk(folder):
        odd = [d for d in folders if Path(d).suffix.lower() in VIDEO_SUFFIXES + IMAGE_SUFFIXES]
        folders[:] = [d for d in folders if d not in odd and not d.startswith(".")]
        names += [(Path(top) / f).relative_to(folder).as_posix() for f in files + odd if not f.startswith(".")]
    return sorted(names)


def _beside(name: str, samples: bool) -> list[str]:
    """The files that may hold a clip's caption, the likeliest first; [] for a file that is no clip."""
    path = Path(name)
    if path.suffix.lower() not in VIDEO_SUFFIXES + IMAGE_SUFFIXES:
        return []
    stems = [path.with_suffix("")]
    if samples and (sample := path.name.split(".")[0]):
        stems.append(path.with_name(sample))
    return [f"{stem.as_posix()}{suffix}" for suffix in (".txt", ".json") for stem in stems]


def _caption(name: str, beside: list[str], read: Callable, captions: dict[str, str], needed: bool) -> str:
    """A clip's caption with normalised spaces, from a .txt beside it, a table, or a .json beside it, in this order."""
    texts = [other for other in beside if other.endswith(".txt")]
    text = None
    if texts:
        text = read(texts[0]).decode("utf-8-sig", "surrogateescape")
    elif name in captions:
        text = captions[name]
    elif beside:
        text = caption_of(json_or_none(read(beside[0]).decode("utf-8-sig", "surrogateescape")))
    if text is None and needed:
        own = Path(name).with_suffix(".txt").name
        keys = f", and {beside[0]} has none of {', '.join(CAPTION_KEYS)}" if beside else ""
        raise BadClip(name, "no caption", f"neither {own} nor a row of {' or '.join(TABLES + METADATA)}{keys}")
    return clean_caption(name, text or "", needed)


def clean_caption(name: str, text: str, needed: bool) -> str:
    """The caption with runs of white space as single spaces.

    Raises:
        BadClip: it contains surrogates, which stand for bytes that are not UTF-8, or it is empty and `needed`.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadClip(name, "caption not UTF-8", f"at character {error.start}") from error
    text = " ".join(text.split())
    if needed and not text:
        raise BadClip(name, "empty caption")
    return text


def caption_of(row: object) -> str | None:
    """The caption in a table's row or a .json file; None if there is none."""
    metadata = row if isinstance(row, dict) else {}
    return next((metadata[key] for key in CAPTION_KEYS if isinstance(metadata.get(key), str)), None)


def _read_tables(files: list[str], read: Callable[[str], bytes], report: SkipReport) -> dict[str, str]:
    """File name -> caption, from the tables of a folder. Rows without either are reported with their number."""
    captions = {}
    for table in (name for name in files if name in TABLES or Path(name).name in METADATA):
        text = read(table).decode("utf-8-sig", "surrogateescape")
        rows = _jsonl_rows(text) if table.endswith("jsonl") else _csv_rows(text)
        for number, row in enumerate(rows, 1):
            file = (row.get("file") or row.get("file_name")) if isinstance(row, dict) else None
            caption = caption_of(row)
            if isinstance(file, str) and caption is not None:
                captions.setdefault((Path(table).parent / file).as_posix(), caption)
            else:
                detail = f"it needs 'file' (or 'file_name') and one of {', '.join(CAPTION_KEYS)}, both text"
                report.add(f"{table}:{number}", "bad caption row", detail)
    return captions


def _jsonl_rows(text: str) -> Iterator[object]:
    for line in filter(str.strip, text.split("\n")):
        yield json_or_none(line)


def _csv_rows(text: str) -> Iterator[object]:
    try:
        yield from csv.DictReader(io.StringIO(text, newline=""))
    except csv.Error:  # a field of more than 128 KiB; the start of the next row is unknown
        yield None


def header(media: Media) -> VideoInfo:
    """The size and frame rate of a clip, without decoding; VideoError if it is no readable video or image."""
    content = media.content
    if not isinstance(content, np.ndarray):
        return probe(content)
    shape, fps = content.shape, media.fps
    if content.dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
        raise VideoError("not a video", f"frames are {content.dtype} {shape}, and should be uint8 (T, H, W, 3)")
    if shape[0] > 1 and not fps:
        raise VideoError("no frame rate", f"{shape[0]} frames have no frames per second: give the source an fps")
    return VideoInfo(*shape[:3], fps or STILL_FPS)
