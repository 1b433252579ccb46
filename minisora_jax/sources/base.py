"""Sources of clips: a source is a sequence of `Media`, which are undecoded files with their captions.

    clips/
      cat.mp4  cat.txt            a folder: a caption beside its clip,
      sub/dog.webm  photo.png     or in one table at the top:
      captions.jsonl              {"file": "sub/dog.webm", "caption": "a dog runs"} a line, or
      captions.csv                a header line `file,caption`, then rows
      metadata.jsonl, .csv        Hugging Face's image and video folders: `file_name` and `text`, in any subfolder
      actions.jsonl               what was done, see sources/actions.py
    imagenet/train?caption=folder
      n02099601/1.JPEG            the caption is the name of the folder: a class
    shapes:train:5000             the procedural clips of toy/shapes.py
    gym:CartPole-v1               a game, played when its clips are needed
    clips.tar, gs://..., ...      docs/sources.md lists them all

`spec.open_source` opens a source by its name. A source skips files that cannot become clips. A `SkipReport` names them
and counts them by reason; they stop a run only if `strict`. `prepare` decodes the clips; this module does not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from minisora_jax.io.filesystem import open_regular, text_of, walk
from minisora_jax.media.video import (
    IMAGE_SUFFIXES,
    STILL_FPS,
    VIDEO_SUFFIXES,
    StoredFrames,
    Video,
    VideoError,
    VideoInfo,
    open_video,
    read_clip_frames,
)
from minisora_jax.sources.actions import TABLE, read_table
from minisora_jax.sources.captions import MAX_CAPTION, MAX_TABLE, caption_option, is_table, scan_names
from minisora_jax.sources.skips import SkipReport

PREPROCESSING_VERSION = 2  # changes when the same file gives other pixels; caches store it


# Plays an episode: uint8 frames (T, H, W, 3) and the actions (T, A). It calls its argument at each frame.
Play = Callable[[Callable[[], None]], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Media:
    """An undecoded clip and its caption ("" for none)."""

    name: str  # unique within its source; a path within a folder has forward slashes
    caption: str
    # A file, its bytes, uint8 RGB frames (T, H, W, 3), the failure, or how to play an episode.
    data: Path | bytes | np.ndarray | VideoError | Play = dataclasses.field(repr=False)
    fps: float | None = None  # frames per second; None: the file states it. Frames need it if T > 1
    window: int | None = None  # it becomes clips of so many frames, one after another; None: one clip
    actions_TA: np.ndarray | None = None  # float32: row i is the action that led to frame i; None: it has none

    def played(self, alive: Callable[[], None] = lambda: None) -> Media:
        """This clip with its frames and actions, if its data is a function that plays them; else itself."""
        if not callable(self.data):
            return self
        frames_THWC, actions_TA = self.data(alive)
        return dataclasses.replace(self, data=frames_THWC, actions_TA=actions_TA)

    @property
    def content(self) -> Path | bytes | np.ndarray:
        """The data; raises its VideoError if there is none."""
        data = self.played().data
        assert not callable(data)
        if isinstance(data, Exception):
            raise data
        return data


def stored_frames(arrays: dict[str, np.ndarray], start: int = 0, count: int | None = None) -> np.ndarray:
    """Frames of a record, uint8 (T, H, W, 3), which `prepare` stores as pixels or, with --crf, as an mp4.

    Of an mp4 only those frames are decoded, and those since the key frame before them.

    Args:
        start: The first frame.
        count: How many; None: all that follow.
    """
    if "frames" in arrays:
        return arrays["frames"][start : None if count is None else start + count]
    return read_clip_frames(arrays["mp4"].tobytes(), start=start, max_frames=count)[0]


class Source(Protocol):
    """A sequence of Media. It pickles into few bytes, so a worker gets (source, range of indices)."""

    identity: str  # a fingerprint of the contents
    report: SkipReport  # the files that the source's own scan skipped
    actions: tuple[str, ...]  # the names of the columns of the clips' actions; () if no clip has any

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Media: ...


# ---- Procedural clips


class ProceduralShapes:
    """The clips of toy/shapes.py as a source, drawn on demand.

    Args:
        spec: "shapes[:SPLIT[:COUNT]]"; the defaults are train and 1024.
    """

    actions = ()

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
        caption: "folder": the caption of a clip is the name of the folder below `path` that it lies in, its class.
        need_caption: skip clips without a caption.
        strict: raise BadClip instead of skipping.

    Raises:
        FileNotFoundError: the path is no folder.
        ValueError: `caption` is neither "" nor "folder".
        DataError: rows of actions.jsonl have different names.
    """

    def __init__(self, path: str | os.PathLike, caption: str = "", *, need_caption: bool = True, strict: bool = False):
        self.path, self.need_caption = Path(path), need_caption
        self.caption = caption_option(os.fspath(path), caption)
        if not self.path.is_dir():
            raise FileNotFoundError(f"{path} is not a folder of clips")
        self.report = SkipReport(strict)
        self.entries: list[tuple[str, str]] = _scan(self)  # (name, caption)
        self.actions, self.table = (), {}
        if (file := self.path / TABLE).is_file():
            with open_regular(file) as opened:
                self.actions, self.table = read_table(text_of(opened.read(MAX_TABLE)), self.report)
        for name in sorted(set(self.table) - {name for name, _ in self.entries}):
            self.report.add(name, "actions without a clip", f"its row in {TABLE} names no clip")
        metadata = (f.stat() if (f := self.path / name).exists() else f.lstat() for name, _ in self.entries)
        rows = ([name, caption, s.st_size, s.st_mtime_ns] for (name, caption), s in zip(self.entries, metadata))
        digest = hashlib.sha256()
        for row in rows:
            digest.update(json.dumps(row).encode("utf-8"))
        for name, actions_TA in sorted(self.table.items()):
            digest.update(json.dumps([name, self.actions, actions_TA.tolist()]).encode("utf-8"))
        self.identity = f"folder:{digest.hexdigest()}"

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, i: int) -> Media:
        name, caption = self.entries[i]
        return Media(name, caption, self.path / name, actions_TA=self.table.get(name))

    def __reduce__(self):
        return reopened, (Folder, (str(self.path.resolve()), self.caption), self.need_caption, self.identity)


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


def _scan(folder: Folder) -> list[tuple[str, str]]:
    def read(name: str) -> bytes:
        with open_regular(folder.path / name) as file:
            if (size := os.fstat(file.fileno()).st_size) > (MAX_TABLE if is_table(name) else MAX_CAPTION):
                raise OSError(f"{name} has {size} bytes, too many for a caption")
            return file.read()

    files = _files(folder.path, folder.report)
    return scan_names(files, read, folder.need_caption, folder.report, caption=folder.caption)


def _files(folder: Path, report: SkipReport) -> list[str]:
    """The names of all visible files under a folder, sorted. A folder called x.mp4 counts as a (bad) file."""
    is_clip = lambda name: Path(name).suffix.lower() in VIDEO_SUFFIXES + IMAGE_SUFFIXES
    return sorted(walk(folder, is_clip, lambda name, detail: report.add(name, "unreadable folder", detail)))


@contextlib.contextmanager
def open_media(media: Media) -> Iterator[Video]:
    """The open video of a clip; VideoError if it is no readable video or image."""
    content = media.content
    if not isinstance(content, np.ndarray):
        with open_video(content, made=True) as video:
            yield video
        return
    shape, fps = content.shape, media.fps
    if content.dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
        raise VideoError("not a video", f"frames are {content.dtype} {shape}, and should be uint8 (T, H, W, 3)")
    if shape[0] > 1 and not fps:
        raise VideoError("no frame rate", f"{shape[0]} frames have no frames per second: give the source an fps")
    yield Video(media.name, StoredFrames(content, fps or STILL_FPS), still=shape[0] == 1)


def header(media: Media) -> VideoInfo:
    """The size, length and frame rate of a clip; VideoError if it is no readable video or image."""
    with open_media(media) as video:
        return video.info
