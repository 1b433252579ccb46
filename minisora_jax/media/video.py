"""Read video and image files as uint8 RGB frames (T, H, W, 3), as players show them; video_writer.py writes them.

A file is a path, or the bytes of a file. Its first bytes tell what it is (sniff.py), and opening.py opens it. Frames
come at the clip's rate (timeline.py), upright and with square pixels (container.py), in BT.709 of standard range
(colour.py). Grey becomes RGB, and transparency is composited onto black. Our own files are saved larger than they were
made; who works on with their frames reads them as they were made (as_made.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from minisora_jax.media.as_made import AsMade, as_made
from minisora_jax.media.container import ContainerVideo, Fit
from minisora_jax.media.opening import MAX_BYTES, MediaFile, VideoError, label, opened
from minisora_jax.media.picture import Picture
from minisora_jax.media.resize import resized
from minisora_jax.media.sniff import GIF, SOUND
from minisora_jax.media.timeline import STILL_FPS, Timeline

__all__ = ["STILL_FPS", "Fit", "MediaFile", "StoredFrames", "Video", "VideoError", "VideoInfo", "open_video"]

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".3gp", ".webm", ".mkv", ".avi", ".gif")
VIDEO_SUFFIXES += (".mpg", ".mpeg", ".ts", ".m2ts", ".mts", ".wmv", ".flv", ".ogv")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".mpo", ".webp", ".bmp", ".avif", ".heic", ".heif")
IMAGE_SUFFIXES += (".tif", ".tiff", ".jp2", ".jxl")  # which are named, not read


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """A file as it is shown. Height and width are in pixels, `fps` in frames per second.

    `remarks` are sentences for a user, such as that the file has several video streams.
    """

    frames: int
    height: int
    width: int
    fps: float
    sound: bool = False
    remarks: tuple[str, ...] = ()


class Video:
    """An open file. Use it as long as `open_video` holds it open, one iterator at a time."""

    def __init__(self, name: str, content: ContainerVideo | Picture | StoredFrames | AsMade, still: bool):
        self.name, self._content = name, content
        self.info = VideoInfo(
            len(content.timeline),
            content.height,
            content.width,
            content.timeline.fps,
            content.sound,
            tuple(content.remarks),
        )
        self.note = content.comment
        self.still = still

    def count(self, fps: float | None = None) -> int:
        """The number of frames at a rate; None: at the file's own."""
        return 1 if self.still else self._content.timeline.count(fps)

    def frames(self, start: int = 0, *, fps: float | None = None, fit: Fit | None = None) -> Iterator[np.ndarray]:
        """Frames start, start + 1, ..., each uint8 (H, W, 3). Memory holds one frame at a time.

        Args:
            fps: the rate at which frames are numbered and taken; None for the file's own.
            fit: from (height, width) as shown to the height and width of the frames, to which they are resized while
                they are decoded; None keeps the size.

        Raises:
            VideoError: 'zero frames' (there is no frame from `start` on), or 'corrupt frames' when the iterator reaches
                a frame that the decoder refuses.
        """
        timeline, rate = self._content.timeline, None if self.still else fps
        shown = self._content.frames(start / (rate or timeline.fps), fit)
        last, count = None, 0
        for picture in timeline.resampled(shown, start, rate):
            if last is None or picture is not last[0]:
                last = picture, picture()
            count += 1
            yield last[1]
        if not count:
            header = f"its header states {self._content.header_frames}"
            raise VideoError("zero frames", f"{self.name} has no frame from {start} on; {header}")

    def read(
        self,
        start: int = 0,
        stop: int | None = None,
        *,
        fps: float | None = None,
        fit: Fit | None = None,
    ) -> np.ndarray:
        """Frames [start, stop), uint8 (T, H, W, 3), fewer where the file ends. The arguments are those of `frames`.

        Raises:
            VideoError: 'too large' if the frames take more than `MAX_BYTES`, and the reasons of `frames`.
        """
        stop = self.count(fps) if stop is None else min(stop, self.count(fps))
        return collected(self.frames(start, fps=fps, fit=fit), stop - start, self.name)


def collected(frames: Iterator[np.ndarray], most: int, name: str) -> np.ndarray:
    """At most so many of the next frames (at least one), uint8 (T, H, W, 3). Memory holds them once.

    Raises:
        VideoError: 'too large' before the second frame if all take more than `MAX_BYTES`.
    """
    first = next(frames)
    most = max(most, 1)
    if (size := most * first.nbytes) > MAX_BYTES:
        H, W, _ = first.shape
        raise VideoError(
            "too large",
            f"{most} frames of {H}x{W} of {name} take {size / 2**30:.1f} GiB, and the limit is "
            f"{MAX_BYTES / 2**30:g} GiB: take fewer frames, or a smaller size",
        )
    frames_THWC, count = np.empty((most, *first.shape), np.uint8), 1
    frames_THWC[0] = first
    for frame in itertools.islice(frames, most - 1):
        frames_THWC[count] = frame
        count += 1
    return frames_THWC[:count]


class StoredFrames:
    """Frames in memory, uint8 (T, H, W, 3), with the attributes of `ContainerVideo`."""

    sound, remarks, comment = False, (), ""

    def __init__(self, frames_THWC: np.ndarray, fps: float):
        self.stored = frames_THWC
        self.header_frames, self.height, self.width, _ = frames_THWC.shape
        self.timeline = Timeline(np.arange(len(frames_THWC)) / fps, len(frames_THWC) / fps, fps)

    def frames(self, start: float, fit: Fit | None) -> Iterator[tuple[float, Callable[[], np.ndarray]]]:
        """As `ContainerVideo.frames`."""
        size_HW = fit(self.height, self.width) if fit else (self.height, self.width)
        for k in range(max(0, int(start * self.timeline.fps) - 1), len(self.stored)):
            yield float(self.timeline.stamps[k]), lambda k=k: resized(self.stored[k : k + 1], size_HW)[0]


@contextlib.contextmanager
def open_video(file: MediaFile, *, made: bool = False) -> Iterator[Video]:
    """The open video or image of a path, or of the bytes of a file.

    Args:
        made: read a file of ours, which was saved larger, at the size at which it was made.

    Raises:
        VideoError: 'unreadable file', 'empty file', 'not a video', 'not an image', 'truncated', 'audio only',
            'zero frames', 'corrupt frames' or 'too large'.
    """
    with opened(file) as (stream, file_format):
        named_image = not isinstance(file, bytes) and Path(file).suffix.lower() in IMAGE_SUFFIXES
        if not file_format.readable and file_format is not SOUND and (file_format.picture or named_image):
            fix = ": convert it to JPEG or PNG" if file_format.picture else ""
            raise VideoError("not an image", f"{label(file)} is {file_format.name}{fix}")
        kind = Picture if file_format.pillow else ContainerVideo
        content = kind(file, stream, file_format)
        still = (file_format.picture or file_format is GIF) and len(content.timeline) == 1
        yield Video(label(file), as_made(file, content) if made else content, still)


def probe(file: MediaFile, *, made: bool = False) -> VideoInfo:
    """The size, rate and length of a file, which decodes its first frame at most. Else as `open_video`."""
    with open_video(file, made=made) as video:
        return video.info


def read_clip_frames(
    file: MediaFile,
    *,
    start: int = 0,
    max_frames: int | None = None,
    fps: float | None = None,
    fit: Fit | None = None,
    made: bool = False,
) -> tuple[np.ndarray, float]:
    """Frames start, start + 1, ... of a file, at most `max_frames`: (uint8 (T, H, W, 3), frames per second).

    `Video.frames` has the meaning of `fps` and `fit`, `open_video` that of `made`. Raises VideoError as both do, and as
    `Video.read` does.
    """
    if start < 0 or (max_frames is not None and max_frames < 1):
        raise ValueError(f"start={start} must be at least 0 and max_frames={max_frames} at least 1")
    with open_video(file, made=made) as video:
        stop = None if max_frames is None else start + max_frames
        return video.read(start, stop, fps=fps, fit=fit), fps or video.info.fps


def read_note(path: MediaFile) -> str:
    """The note that `write_video` stored in a file; "" for none. VideoError for a file that is no video or image."""
    with open_video(path) as video:
        return video.note
