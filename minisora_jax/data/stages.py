"""What one file goes through to become clips. Every stage is a pure function: it gives a candidate on, or a `Drop`.

    Media  ->  decode  ->  Candidate | Drop

A file becomes a clip by two cuts only: its first 1 + 4k frames, as many as there are up to `max_frames`, and a centre
crop of less than one `cell` of height and of width. Nothing is resized.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from minisora_jax.data.sources import Media
from minisora_jax.data.video import STILL_FPS, VideoError, VideoInfo, open_frames, probe


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A clip that no stage has refused so far."""

    name: str
    caption: str
    frames_THWC: np.ndarray  # uint8 RGB, T = 1 + 4k, H and W multiples of the cell
    fps: float
    source: str  # sha256 of the file that it comes from
    still: bool = False  # of an image: nothing can be asked of its motion
    shortened: bool = False  # the file goes on after it


@dataclasses.dataclass(frozen=True)
class Drop:
    """A clip or file that a stage refused. `reason` is a fixed phrase to count by, `detail` has the numbers."""

    name: str
    stage: str
    reason: str
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What sizes clips may have. cell: pixels, of which heights and widths become multiples (the codec's factor times
    the patch). max_frames: 1 + 4k. max_pixels: height * width of the largest frame taken."""

    cell: int = 8
    max_frames: int = 121
    max_pixels: int = 4096 * 4096

    def __post_init__(self):
        if self.cell < 1 or self.max_pixels < self.cell * self.cell:
            raise ValueError(f"cell={self.cell} must be at least 1, and max_pixels={self.max_pixels} at least one cell")
        if self.max_frames != clip_length(self.max_frames):
            low = clip_length(self.max_frames) if self.max_frames > 0 else 1
            raise ValueError(f"max_frames={self.max_frames} must be 1 + 4*k; use {low} or {low + 4}")


def decode(media: Media, sizes: Sizes) -> Candidate | Drop:
    """The first frames of a file, cropped to cells."""
    try:
        info = header(media)
        check_size(info.height, info.width, sizes)
        with opened(media) as (frames, fps):
            frames_THWC = np.stack(list(itertools.islice(frames, sizes.max_frames)))
        check_size(*frames_THWC.shape[1:3], sizes)  # the header may have said otherwise
    except VideoError as error:
        return Drop(media.name, "decode", error.reason, error.detail)
    frames_THWC = crop_to_cells(frames_THWC[: clip_length(len(frames_THWC))], sizes.cell)
    still, shortened = info.frames == 1, info.frames > sizes.max_frames
    return Candidate(
        media.name, media.caption, np.ascontiguousarray(frames_THWC), fps, content_hash(media), still, shortened
    )


def header(media: Media) -> VideoInfo:
    """Size and rate without decoding; VideoError for what is no video or image, or could not be read."""
    if isinstance(media.data, VideoError):
        raise media.data
    if not isinstance(media.data, np.ndarray):
        return probe(media.data)
    shape, fps = media.data.shape, media.fps
    if media.data.dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
        raise VideoError("not a video", f"frames are {media.data.dtype} {shape}, and should be uint8 (T, H, W, 3)")
    if shape[0] > 1 and not fps:
        raise VideoError("no frame rate", f"{shape[0]} frames came without their number a second")
    return VideoInfo(*shape[:3], fps or STILL_FPS)


@contextlib.contextmanager
def opened(media: Media) -> Iterator[tuple[Iterator[np.ndarray], float]]:
    """(frames one by one, each uint8 (H, W, 3); frames per second) of a file of any length."""
    if isinstance(media.data, np.ndarray):
        yield iter(media.data), media.fps or STILL_FPS
        return
    with open_frames(media.data) as (frames, fps):
        yield frames, media.fps or fps


def check_size(height: int, width: int, sizes: Sizes) -> None:
    if min(height, width) < sizes.cell:
        raise VideoError("too small", f"{height}x{width} pixels, cells of {sizes.cell}")
    if height * width > sizes.max_pixels:
        raise VideoError("too large", f"{height}x{width} pixels, at most {sizes.max_pixels}")


def content_hash(media: Media) -> str:
    """sha256 of the file, or of the frames where there is none."""
    if isinstance(media.data, Path):
        with open(media.data, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(media.data).hexdigest()


def clip_length(frames: int) -> int:
    """The longest 1 + 4k within `frames`."""
    return 1 + 4 * ((frames - 1) // 4)


def crop_to_cells(frames_THWC: np.ndarray, cell: int) -> np.ndarray:
    """The centre of each frame, height and width lowered to multiples of `cell`. A view."""
    H, W = frames_THWC.shape[1:3]
    top, left = H % cell // 2, W % cell // 2
    return frames_THWC[:, top : top + H // cell * cell, left : left + W // cell * cell]
