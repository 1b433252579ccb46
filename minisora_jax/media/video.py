"""Read video and image files as uint8 RGB frames (T, H, W, 3); video_writer.py writes them.

PyAV decodes videos at native size and frame rate; a file of variable rate keeps its frames and gets its average rate.
Rotation tags in quarter turns are applied and colour matrices are honoured. Grey becomes RGB, and transparency is
composited onto black. Pillow reads still images.

A file is a path, or the bytes of a file. Of a path the suffix tells an image from a video, of bytes the first bytes do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.video.stream import VideoStream
from PIL import Image, ImageOps

VideoFile = str | os.PathLike | bytes  # a path, or the bytes of a file

VIDEO_SUFFIXES = (".mp4", ".avi", ".webm", ".mov", ".mkv", ".gif")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
STILL_FPS = 8.0  # frames per second assigned to an image; the procedural clips have the same rate
REORDER = 16  # a seek goes back by this many frames, since codecs decode frames in another order than they show them


class VideoError(ValueError):
    """A file without readable frames. `reason` is one of a few fixed phrases; the message adds the numbers."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """The header of a file. `frames` is 0 where the header has no count (webm, mkv, gif); sizes are in pixels."""

    frames: int
    height: int
    width: int
    fps: float


# ---- Reading


def probe(file: VideoFile) -> VideoInfo:
    """The header of a file. Height and width are as stored, before any quarter turn.

    Raises:
        VideoError: 'unreadable file', 'empty file', 'not a video', 'not an image', 'truncated' or 'audio only'.
    """
    if is_image(file):
        with _open_image(file) as image:
            return VideoInfo(1, image.height, image.width, STILL_FPS)
    with _open_video(file) as container:
        stream = container.streams.video[0]
        return VideoInfo(stream.frames, stream.height, stream.width, _fps(stream))


def read_clip_frames(file: VideoFile, *, start: int = 0, max_frames: int | None = None) -> tuple[np.ndarray, float]:
    """Frames start, start + 1, ... of a file, at most `max_frames`: (uint8 (T, H, W, 3), frames per second).

    Raises:
        VideoError: the reasons of `probe`, 'zero frames' (there is no frame from `start` on), 'truncated', or 'corrupt
            frames' (the decoder refuses a requested frame).
    """
    if start < 0 or (max_frames is not None and max_frames < 1):
        raise ValueError(f"start={start} must be at least 0 and max_frames={max_frames} at least 1")
    with open_frames(file, start=start) as (frames, fps):
        return np.stack(list(itertools.islice(frames, max_frames))), fps


@contextlib.contextmanager
def open_frames(file: VideoFile, *, start: int = 0) -> Iterator[tuple[Iterator[np.ndarray], float]]:
    """(iterator over frames start, start + 1, ..., each uint8 (H, W, 3); frames per second).

    Memory holds one frame at a time. The iterator raises VideoError like `read_clip_frames` when it reaches the damage.
    """
    if is_image(file):
        if start:
            raise VideoError("zero frames", f"{_label(file)} is one image, and start={start}")
        yield iter([_read_image(file)]), STILL_FPS
        return
    with _open_video(file) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        fps = _fps(stream)
        yield _rgb_frames(file, container, stream, start, fps), fps


def _rgb_frames(
    file: VideoFile, container: InputContainer, stream: VideoStream, start: int, fps: float
) -> Iterator[np.ndarray]:
    count, size, end = 0, None, 0.0
    try:
        for frame in _decode_from(container, stream, start):
            if frame.is_corrupt:
                raise VideoError("corrupt frames", f"{_label(file)} is damaged at frame {start + count}")
            pixels = _to_rgb(frame)
            if size not in (None, pixels.shape):
                sizes = sorted([size[:2], pixels.shape[:2]])
                raise VideoError("corrupt frames", f"{_label(file)} changes its frame size midway: {sizes}")
            size, end, count = pixels.shape, (frame.time or 0.0) + 1 / fps, count + 1
            yield pixels
    except (FFmpegError, OSError) as error:
        raise VideoError("corrupt frames", f"{_label(file)} fails after frame {start + count}: {error}") from error
    if not count:
        header = f"its header states {stream.frames}"
        raise VideoError("zero frames", f"{_label(file)} has no frame from {start} on; {header}")
    _check_reached_end(file, container, stream, start + count, end)


def is_image(file: VideoFile) -> bool:
    """Whether a file is a still image, by the suffix of a path or by the first bytes."""
    if isinstance(file, bytes):
        return file.startswith((b"\x89PNG", b"\xff\xd8\xff", b"BM")) or file[8:12] == b"WEBP"
    return Path(file).suffix.lower() in IMAGE_SUFFIXES


def _label(file: VideoFile) -> str:
    """The name of a file in error messages."""
    return f"the file of {len(file)} bytes" if isinstance(file, bytes) else str(file)


def _open_video(file: VideoFile) -> InputContainer:
    head = _head(file)
    try:
        container = av.open(io.BytesIO(file) if isinstance(file, bytes) else os.fspath(file), "r")
    except (FFmpegError, OSError) as error:
        if _looks_like_video(head):
            raise VideoError("truncated", f"{_label(file)} begins as a video and then stops: {error}") from error
        raise VideoError("not a video", f"{_label(file)} begins with {head!r}: {error}") from error
    try:
        if not container.streams.video:
            kinds = ", ".join(s.type for s in container.streams) or "none"
            # FFmpeg opens a text file as a subtitle, so "audio only" needs an audio stream.
            reason = "audio only" if container.streams.audio else "not a video"
            raise VideoError(reason, f"{_label(file)} has streams: {kinds}")
        stream = container.streams.video[0]
        size = len(file) if isinstance(file, bytes) else os.path.getsize(file)
        height, width = (0, 0) if stream.codec_context is None else (stream.height, stream.width)
        if not (height and width):
            raise VideoError("not a video", f"{_label(file)} has a video stream of size {height}x{width}")
        end = max((e.pos + e.size for e in stream.index_entries), default=0)
        if head.startswith(b"RIFF"):
            end = int.from_bytes(head[4:8], "little") + 8
        if end > size:
            raise VideoError("truncated", f"{_label(file)} has {size} bytes, and its header or index states {end}")
    except VideoError:
        container.close()
        raise
    return container


def _head(file: VideoFile) -> bytes:
    """The first 16 bytes; VideoError for an unreadable or empty file."""
    if isinstance(file, bytes):
        head = file[:16]
    else:
        try:
            with open(file, "rb") as opened:
                head = opened.read(16)
        except OSError as error:
            raise VideoError("unreadable file", f"{file}: {error.strerror}") from error
    if not head:
        raise VideoError("empty file", f"{_label(file)} has 0 bytes")
    return head


def _looks_like_video(head: bytes) -> bool:
    """Whether the first bytes are the signature of a container: mp4 and mov, avi, webm and mkv, gif."""
    return head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free") or head.startswith(
        (b"RIFF", b"\x1a\x45\xdf\xa3", b"GIF8")
    )


def _decode_from(container: InputContainer, stream: VideoStream, start: int) -> Iterator[av.VideoFrame]:
    """Decoded frames from number `start` on. If the index shows a constant rate, seek to the key frame before it."""
    stamps = np.array([e.timestamp for e in stream.index_entries], np.int64)
    steps = np.diff(stamps)
    if not start or len(stamps) != stream.frames or steps.size == 0 or steps.max() - steps.min() > 1:
        yield from itertools.islice(container.decode(stream), start, None)
        return
    step = (stamps[-1] - stamps[0]) / steps.size
    target = (stream.start_time or 0) + start * step
    container.seek(int(target - REORDER * step), stream=stream, backward=True)
    for frame in container.decode(stream):
        if frame.pts is None or frame.pts > target - step / 2:
            yield frame


def _check_reached_end(file: VideoFile, container: InputContainer, stream: VideoStream, count: int, end: float) -> None:
    """VideoError if the file should go on after `count` frames, which end at `end` seconds.

    The size check against the index covers mp4; this covers webm, mkv and gif.
    """
    kind = container.format.name
    if "matroska" in kind and "DURATION" in stream.metadata:
        hours, minutes, seconds = stream.metadata["DURATION"].split(":")
        declared = 3600 * int(hours) + 60 * int(minutes) + float(seconds)
        if end < 0.9 * declared - 2 / _fps(stream):  # headers round up
            raise VideoError("truncated", f"{_label(file)} ends at {end:.3f} s, and its header states {declared:.3f} s")
    if kind == "gif":
        data = file if isinstance(file, bytes) else Path(file).read_bytes()
        if not data.rstrip(b"\0").endswith(b";"):
            raise VideoError("truncated", f"{_label(file)} has {count} frames and lacks a gif's end mark")


def _fps(stream: VideoStream) -> float:
    """The header's average rate. An AVI counts empty slots as frames, so its rate comes from the stored frames."""
    rate = stream.average_rate or stream.guessed_rate
    if not rate or rate <= 0:
        raise VideoError("not a video", f"{stream.container.name} states no frame rate")
    stamps = [e.timestamp for e in stream.index_entries if e.size]
    if stream.container.format.name == "avi" and 1 < len(stamps) < stream.frames:
        rate = (len(stamps) - 1) / ((stamps[-1] - stamps[0]) * stream.time_base)
    return float(rate)


def _to_rgb(frame: av.VideoFrame) -> np.ndarray:
    if any(c.is_alpha for c in frame.format.components) or frame.format.name == "pal8":
        pixels = _over_black(frame.to_ndarray(format="rgba"))
    else:
        pixels = frame.to_ndarray(format="rgb24")
    return np.rot90(pixels, k=round(frame.rotation / 90) % 4)


def _over_black(rgba: np.ndarray) -> np.ndarray:
    alpha = rgba[..., 3:].astype(np.uint16)
    return ((rgba[..., :3] * alpha + 127) // 255).astype(np.uint8)


def _open_image(file: VideoFile) -> Image.Image:
    head = _head(file)
    try:
        return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
    except Image.DecompressionBombError as error:
        raise VideoError("too large", f"{_label(file)}: {error}") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise VideoError("not an image", f"{_label(file)} begins with {head!r}") from error


def _read_image(file: VideoFile) -> np.ndarray:
    with _open_image(file) as image:
        try:
            image.load()
        except (OSError, SyntaxError, ValueError) as error:
            reason = "truncated" if "truncated" in str(error) else "corrupt frames"
            raise VideoError(reason, f"{_label(file)}: {error}") from error
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16"):  # 16-bit grey: Pillow's own conversion would clip it at 255
            return np.repeat((np.asarray(upright) >> 8).astype(np.uint8)[..., None], 3, axis=-1)
        return _over_black(np.asarray(upright.convert("RGBA")))


def read_note(path: str | os.PathLike) -> str:
    """The note that `write_video` stored in a file; "" for none. VideoError for a file that is no video or image."""
    path = Path(path)
    if path.suffix.lower() in (".png", ".gif"):
        with _open_image(path) as image:
            note = image.info.get("comment", b"")
            return note.decode("utf-8", "replace") if isinstance(note, bytes) else note
    with _open_video(path) as container:
        return {k.lower(): v for k, v in container.metadata.items()}.get("comment", "")
