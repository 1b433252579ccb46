"""What one file goes through to become clips. Every stage is a pure function: it gives a clip on, or a `Drop`.

    Media -> probe -> shots -> decode -> filters -> Candidate | Drop ...           clips_of(media, curation)

A clip is cut from its file, and nothing is resized: in time to a shot's (or the file's first) 1 + 4k frames, as many as
there are up to `max_frames`, and in space by a centre crop of less than one `cell` of height and of width. With the
shot cut on, a file gives a clip for each shot, and for each `max_frames` of a longer one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from minisora_jax.curation import shots
from minisora_jax.curation.duplicates import clip_hash
from minisora_jax.curation.filters import Filters, measure
from minisora_jax.io.video import STILL_FPS, VideoError, VideoInfo, is_image, open_frames
from minisora_jax.sources.base import Media, header


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A clip that no stage has refused so far."""

    name: str
    caption: str
    frames_THWC: np.ndarray  # uint8 RGB, T = 1 + 4k, H and W multiples of the cell
    fps: float
    source: str = ""  # sha256 of the file that it comes from
    still: bool = False  # of an image: nothing can be asked of its motion
    shortened: bool = False  # the file goes on after it, and nothing else is made of the rest
    scores: dict[str, float] = dataclasses.field(default_factory=dict)  # what curation/filters.py measured
    hash: str = ""  # perceptual, where duplicates are looked for


@dataclasses.dataclass(frozen=True)
class Drop:
    """A clip or file that a stage refused. `reason` is a fixed phrase to count by, `detail` has the numbers."""

    name: str
    stage: str
    reason: str
    detail: str = ""
    scores: dict[str, float] = dataclasses.field(default_factory=dict)
    frame_HWC: np.ndarray | None = None  # to show what it was


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


@dataclasses.dataclass(frozen=True)
class Curation:
    """What is asked of clips. shots: cut files where their shots end."""

    sizes: Sizes = dataclasses.field(default_factory=Sizes)
    shots: bool = False
    filters: Filters = dataclasses.field(default_factory=Filters)

    def check(self) -> None:
        """Import what is needed; ImportError with the command that mends it."""
        self.filters.check()
        if self.shots:
            shots.check()


def clips_of(media: Media, curation: Curation, alive: Callable[[], None] = lambda: None) -> Iterator[Candidate | Drop]:
    """The clips of a file, and what was refused of it. `alive` is called now and then: at each frame, for one."""
    try:
        info = probed(media, curation.sizes)
    except VideoError as error:
        yield Drop(media.name, "probe", error.reason, error.detail)
        return
    still = info.frames == 1 and (isinstance(media.data, np.ndarray) or is_image(media.data))
    try:
        source = content_hash(media)
        spans = spans_of(media, curation, still, alive)
        for clip in decoded(media, spans, curation.sizes, alive):
            shortened = not curation.shots and info.frames > curation.sizes.max_frames
            clip = dataclasses.replace(clip, source=source, still=still, shortened=shortened)
            yield filtered(clip, curation.filters)
            alive()
    except VideoError as error:
        yield Drop(media.name, "decode", error.reason, error.detail)


def probed(media: Media, sizes: Sizes) -> VideoInfo:
    """What the header says, if it may become a clip."""
    info = header(media)
    check_size(info.height, info.width, sizes)
    return info


def spans_of(media: Media, curation: Curation, still: bool, alive: Callable[[], None]) -> list[tuple[int, int]]:
    """The frames [start, end) that clips are made of. Finding shots decodes the whole file, a frame at a time."""
    if still or not curation.shots:
        return [(0, curation.sizes.max_frames)]
    with opened(media, alive) as (frames, fps):
        return shots.pieces(shots.find_shots(frames, fps), curation.sizes.max_frames)


def decoded(media: Media, spans: list, sizes: Sizes, alive: Callable[[], None]) -> Iterator[Candidate]:
    """The clips of a file's spans, in one pass over it and the memory of one clip, cropped to cells."""
    with opened(media, alive) as (frames, fps):
        for start, end in spans:
            frames_THWC = np.stack(list(itertools.islice(frames, end - start)))
            check_size(*frames_THWC.shape[1:3], sizes)  # the header may have said otherwise
            frames_THWC = crop_to_cells(frames_THWC[: clip_length(len(frames_THWC))], sizes.cell)
            name = media.name if len(spans) == 1 else f"{media.name}#{start}-{end}"
            yield Candidate(name, media.caption, np.ascontiguousarray(frames_THWC), fps)


def filtered(clip: Candidate, filters: Filters) -> Candidate | Drop:
    """The clip with its measurements and, where duplicates are looked for, its hash."""
    scores, reason, detail = measure(clip.frames_THWC, clip.fps, clip.still, filters)
    if reason:
        return Drop(clip.name, "filter", reason, detail, scores, clip.frames_THWC[len(clip.frames_THWC) // 2])
    return dataclasses.replace(
        clip, scores=scores, hash=clip_hash(clip.frames_THWC) if filters.duplicates is not None else ""
    )


# ---- Files, frames in memory, and their sizes


@contextlib.contextmanager
def opened(media: Media, alive: Callable[[], None]) -> Iterator[tuple[Iterator[np.ndarray], float]]:
    """(frames one by one, each uint8 (H, W, 3); frames per second) of a file of any length."""

    def watched(frames):
        for frame in frames:
            alive()
            yield frame

    if isinstance(media.data, np.ndarray):
        yield watched(media.data), media.fps or STILL_FPS
        return
    with open_frames(media.data) as (frames, fps):
        yield watched(frames), media.fps or fps


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
