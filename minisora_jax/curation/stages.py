"""The stages from a file to its clips. Every stage is a pure function that returns a clip or a `Drop`.

    Media -> probe -> shots -> decode -> filters -> Candidate | Drop ...           clips_of(media, curation)

Clips are cut, not resized. In time a clip has the first 1 + 4k frames of a shot (or of the file), at most `max_frames`.
In space a centre crop removes less than one `cell` of height and of width. With shots on, a file gives a clip for each
shot, and for each `max_frames` of a longer shot.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from minisora_jax.curation import shots
from minisora_jax.curation.duplicates import clip_hash
from minisora_jax.curation.filters import Filters, measure
from minisora_jax.media.video import STILL_FPS, VideoError, VideoInfo, is_image, open_frames
from minisora_jax.sources.base import Media, header


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A clip that has passed all stages so far."""

    name: str
    caption: str
    frames_THWC: np.ndarray  # uint8 RGB, T = 1 + 4k, H and W multiples of the cell
    fps: float
    source: str = ""  # sha256 of its file
    still: bool = False  # an image, which has no motion to measure
    shortened: bool = False  # the file has more frames, which are not used
    scores: dict[str, float] = dataclasses.field(default_factory=dict)  # the measurements of curation/filters.py
    hash: str = ""  # the perceptual hash, if the filter of duplicates is on


@dataclasses.dataclass(frozen=True)
class Drop:
    """A clip or file that a stage drops. `reason` is a fixed phrase for counting, `detail` has the numbers."""

    name: str
    stage: str
    reason: str
    detail: str = ""
    scores: dict[str, float] = dataclasses.field(default_factory=dict)
    frame_HWC: np.ndarray | None = None  # for the report


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The allowed sizes of clips.

    Args:
        cell: heights and widths become multiples of so many pixels (the codec's factor times the patch).
        max_frames: the frames of the longest clip, 1 + 4k; longer files are cut.
        max_pixels: height * width of the largest frame; larger files are skipped.
    """

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
    """The settings of all stages. `shots` cuts files at the ends of their shots."""

    sizes: Sizes = dataclasses.field(default_factory=Sizes)
    shots: bool = False
    filters: Filters = dataclasses.field(default_factory=Filters)

    def check(self) -> None:
        """Import the needed packages; ImportError with the command that installs a missing one."""
        self.filters.check()
        if self.shots:
            shots.check()


def clips_of(media: Media, curation: Curation, alive: Callable[[], None] = lambda: None) -> Iterator[Candidate | Drop]:
    """The clips of a file and its drops, in order. `alive` is called at each frame, and more often."""
    try:
        info = probed(media, curation.sizes)
    except VideoError as error:
        yield Drop(media.name, "probe", error.reason, error.detail)
        return
    content = media.content
    still = info.frames == 1 and (isinstance(content, np.ndarray) or is_image(content))
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
    """The header of a file; VideoError if it cannot become a clip."""
    info = header(media)
    check_size(info.height, info.width, sizes)
    return info


def spans_of(media: Media, curation: Curation, still: bool, alive: Callable[[], None]) -> list[tuple[int, int]]:
    """The frames [start, end) of each clip of a file. Finding shots decodes the whole file, a frame at a time."""
    if still or not curation.shots:
        return [(0, curation.sizes.max_frames)]
    with opened(media, alive) as (frames, fps):
        return shots.pieces(shots.find_shots(frames, fps), curation.sizes.max_frames)


def decoded(media: Media, spans: list[tuple[int, int]], sizes: Sizes, alive: Callable[[], None]) -> Iterator[Candidate]:
    """The clips of a file's spans, cropped to cells, in one pass over the file. Memory holds one clip."""
    with opened(media, alive) as (frames, fps):
        for start, end in spans:
            frames_THWC = np.stack(list(itertools.islice(frames, end - start)))
            _, H, W, _ = frames_THWC.shape
            check_size(H, W, sizes)  # the header may state another size
            frames_THWC = crop_to_cells(frames_THWC[: clip_length(len(frames_THWC))], sizes.cell)
            name = media.name if len(spans) == 1 else f"{media.name}#{start}-{end}"
            yield Candidate(name, media.caption, np.ascontiguousarray(frames_THWC), fps)


def filtered(clip: Candidate, filters: Filters) -> Candidate | Drop:
    """The clip with its measurements and, if the filter of duplicates is on, its hash; a Drop beyond a limit."""
    scores, reason, detail = measure(clip.frames_THWC, clip.fps, clip.still, filters)
    if reason:
        return Drop(clip.name, "filter", reason, detail, scores, clip.frames_THWC[len(clip.frames_THWC) // 2])
    return dataclasses.replace(
        clip, scores=scores, hash=clip_hash(clip.frames_THWC) if filters.duplicates is not None else ""
    )


# ---- Files, frames in memory, and their sizes


@contextlib.contextmanager
def opened(media: Media, alive: Callable[[], None]) -> Iterator[tuple[Iterator[np.ndarray], float]]:
    """(iterator over frames, each uint8 (H, W, 3); frames per second) of a file of any length."""

    def watched(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for frame in frames:
            alive()
            yield frame

    content = media.content
    if isinstance(content, np.ndarray):
        yield watched(content), media.fps or STILL_FPS
        return
    with open_frames(content) as (frames, fps):
        yield watched(frames), media.fps or fps


def check_size(height: int, width: int, sizes: Sizes) -> None:
    """Raise VideoError for a frame that is smaller than a cell or larger than `max_pixels`."""
    if min(height, width) < sizes.cell:
        raise VideoError("too small", f"{height}x{width} pixels; a cell is {sizes.cell}x{sizes.cell}")
    if height * width > sizes.max_pixels:
        raise VideoError("too large", f"{height}x{width} pixels; max_pixels={sizes.max_pixels}")


def content_hash(media: Media) -> str:
    """The sha256 of the file, or of frames without a file."""
    content = media.content
    if isinstance(content, Path):
        with open(content, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(content).hexdigest()


def clip_length(frames: int) -> int:
    """The largest 1 + 4k that is at most `frames`."""
    return 1 + 4 * ((frames - 1) // 4)


def crop_to_cells(frames_THWC: np.ndarray, cell: int) -> np.ndarray:
    """A view of the centre of each frame, whose height and width are multiples of `cell`."""
    H, W = frames_THWC.shape[1:3]
    top, left = H % cell // 2, W % cell // 2
    return frames_THWC[:, top : top + H // cell * cell, left : left + W // cell * cell]
