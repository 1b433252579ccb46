"""The stages from a file to its clips. Every stage is a pure function that returns a clip or a `Drop`.

    Media -> probe -> shots -> decode -> filters -> Candidate | Drop ...           clips_of(media, curation)

Clips are cut; they are resized or thinned only if `Sizes` says so. In time a clip has the first 1 + 4k frames of a shot
(or of the file), at most `max_frames`. In space a centre crop removes less than one `cell` of height and of width. With
shots on, a file gives a clip for each shot, and for each `max_frames` of a longer shot. A game's episode gives a clip
for each `Media.window` frames. The actions of a clip are those of its frames, so clips with actions are never thinned.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np

from minisora_jax.curation import shots
from minisora_jax.curation.duplicates import clip_hash
from minisora_jax.curation.filters import Filters, measure
from minisora_jax.io.filesystem import open_regular
from minisora_jax.io.user_function import UserFunctionError
from minisora_jax.media.video import Video, VideoError, collected
from minisora_jax.sources.actions import window
from minisora_jax.sources.base import Media, open_media

SHORTEST = 9  # frames of the shortest clip of an episode


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
    remarks: tuple[str, ...] = ()  # of its file, such as that it is interlaced
    source_bytes: int = 0  # the size of its file, stated by the file's first clip only
    scores: dict[str, float] = dataclasses.field(default_factory=dict)  # the measurements of curation/filters.py
    hash: str = ""  # the perceptual hash, if the filter of duplicates is on
    actions_TA: np.ndarray | None = None  # float32, see sources/actions.py


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
        max_side: pixels of the longer side; larger clips are made smaller, with their aspect ratio. None: as they are.
        fps: frames per second; clips of a higher rate are thinned to it. None: as they are.
    """

    cell: int = 8
    max_frames: int = 121
    max_pixels: int = 4096 * 4096
    max_side: int | None = None
    fps: float | None = None

    def __post_init__(self):
        if self.max_side is not None and self.max_side < self.cell:
            raise ValueError(f"max_side={self.max_side} must be at least one cell, {self.cell} pixels")
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise ValueError(f"fps={self.fps:g} must be above 0")
        if self.cell < 1 or self.max_pixels < self.cell * self.cell:
            raise ValueError(f"cell={self.cell} must be at least 1, and max_pixels={self.max_pixels} at least one cell")
        if self.max_frames != clip_length(self.max_frames):
            low = clip_length(self.max_frames) if self.max_frames > 0 else 1
            raise ValueError(f"max_frames={self.max_frames} must be 1 + 4*k; use {low} or {low + 4}")

    def fit(self, height: int, width: int) -> tuple[int, int]:
        """The height and width at which a clip is read."""
        longest = max(height, width)
        if self.max_side is None or longest <= self.max_side:
            return height, width
        scale = self.max_side / longest
        return max(1, round(height * scale)), max(1, round(width * scale))

    def rate(self, fps: float) -> float | None:
        """The rate at which a clip is read; None for its own."""
        return self.fps if self.fps is not None and fps > self.fps else None


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
    """The clips of a file and its drops, in order. `alive` is called at each frame, and more often.

    This is the one place where an error is the file's: whatever a decoder, a filter or any other library raises here
    drops this file, with the error's name as the detail.
    """
    stage = "probe"
    try:
        media = media.played(alive)
        with open_media(media) as video:
            check_size(video.info.height, video.info.width, curation.sizes)
            stage = "decode"
            source = content_hash(media)
            check_actions(media, video, curation.sizes)
            spans = spans_of(video, media, curation, alive)
            size = content_bytes(media)
            for clip in decoded(video, media, spans, curation.sizes, alive):
                stage = "filter"
                yield (kept := filtered(dataclasses.replace(clip, source=source, source_bytes=size), curation.filters))
                stage, size = "decode", 0 if isinstance(kept, Candidate) else size
                alive()
    except VideoError as error:
        yield Drop(media.name, stage, error.reason, error.detail)
    except (ImportError, UserFunctionError, ThinnedActions):
        raise  # these are no fault of the file
    except Exception as error:
        yield Drop(media.name, stage, "unexpected error", f"{type(error).__name__}: {error}")


def spans_of(video: Video, media: Media, curation: Curation, alive: Callable[[], None]) -> list[tuple[int, int]]:
    """The frames [start, end) of each clip of a file. Finding shots decodes the whole file, a frame at a time.

    Raises:
        VideoError: 'too short', for an episode of less than `SHORTEST` frames.
    """
    sizes = curation.sizes
    longest = min(sizes.max_frames, media.window or sizes.max_frames)
    rate = sizes.rate(video.info.fps)
    if curation.shots and not video.still:
        frames = _watched(video.frames(fps=rate, fit=sizes.fit), alive)
        return shots.pieces(shots.find_shots(frames, rate or video.info.fps), longest)
    if media.window is None:
        return [(0, longest)]
    total, shortest = video.count(rate), min(longest, SHORTEST)
    if total < shortest:
        raise VideoError("too short", f"the episode has {total} frames, and a clip of it at least {shortest}")
    spans = ((start, min(start + longest, total)) for start in range(0, total, longest))
    return [(start, end) for start, end in spans if end - start >= shortest]


class ThinnedActions(ValueError):
    """The settings thin a clip with actions. That is no fault of the clip, so the run stops."""


def check_actions(media: Media, video: Video, sizes: Sizes) -> None:
    """Refuse actions that do not belong to the frames of a clip one by one.

    Raises:
        VideoError: the clip has another number of frames.
        ThinnedActions: frames would be left out.
    """
    if media.actions_TA is None:
        return
    if (count := video.count()) != len(media.actions_TA):
        raise VideoError("actions differ", f"it has {count} frames and actions for {len(media.actions_TA)}")
    if sizes.rate(fps := media.fps or video.info.fps):
        raise ThinnedActions(
            f"{media.name} has {fps:g} frames per second and an action for each. fps={sizes.fps:g} would leave out "
            "frames and break their order with the actions: leave --fps out (frame_skip sets the rate of a game)"
        )


def decoded(
    video: Video, media: Media, spans: list[tuple[int, int]], sizes: Sizes, alive: Callable[[], None]
) -> Iterator[Candidate]:
    """The clips of a file's spans, cropped to cells, in one pass over the file. Memory holds one clip."""
    rate = None if video.still else sizes.rate(media.fps or video.info.fps)
    # The source may state another rate than the file; the file's own time is what it is thinned by.
    own = rate * video.info.fps / (media.fps or video.info.fps) if rate else None
    total = video.count(own)
    frames = (crop_to_cells(frame, sizes.cell) for frame in _watched(video.frames(fps=own, fit=sizes.fit), alive))
    for start, end in spans:
        count = clip_length(max(min(end, total) - start, 1))
        frames_THWC = collected(frames, count, media.name)
        for _ in range(min(end, total) - start - count):
            next(frames, None)
        frames_THWC = frames_THWC[: clip_length(len(frames_THWC))]
        check_size(frames_THWC.shape[1], frames_THWC.shape[2], sizes)
        actions_TA = None if media.actions_TA is None else window(media.actions_TA, start, len(frames_THWC))
        name = media.name if len(spans) == 1 else f"{media.name}#{start}-{end}"
        fps = rate or media.fps or video.info.fps
        shortened = len(spans) == 1 and total > sizes.max_frames
        clip = Candidate(name, media.caption, frames_THWC, fps, "", video.still, shortened, video.info.remarks)
        yield dataclasses.replace(clip, actions_TA=actions_TA)


def _watched(frames: Iterator[np.ndarray], alive: Callable[[], None]) -> Iterator[np.ndarray]:
    for frame in frames:
        alive()
        yield frame


def filtered(clip: Candidate, filters: Filters) -> Candidate | Drop:
    """The clip with its measurements and, if the filter of duplicates is on, its hash; a Drop beyond a limit."""
    scores, reason, detail = measure(clip.frames_THWC, clip.fps, clip.still, filters)
    if reason:
        return Drop(clip.name, "filter", reason, detail, scores, clip.frames_THWC[len(clip.frames_THWC) // 2])
    return dataclasses.replace(
        clip, scores=scores, hash=clip_hash(clip.frames_THWC) if filters.duplicates is not None else ""
    )


# ---- Files, frames in memory, and their sizes


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
        with open_regular(content) as file:
            return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
    return hashlib.sha256(content).hexdigest()


def content_bytes(media: Media) -> int:
    """The size of the file, or of frames without a file."""
    content = media.content
    if isinstance(content, Path):
        return content.stat().st_size
    return content.nbytes if isinstance(content, np.ndarray) else len(content)


def clip_length(frames: int) -> int:
    """The largest 1 + 4k that is at most `frames`."""
    return 1 + 4 * ((frames - 1) // 4)


def crop_to_cells(frames: np.ndarray, cell: int) -> np.ndarray:
    """A view of the centre of each frame (..., H, W, 3), whose height and width are multiples of `cell`."""
    H, W = frames.shape[-3:-1]
    top, left = H % cell // 2, W % cell // 2
    return frames[..., top : top + H // cell * cell, left : left + W // cell * cell, :]
