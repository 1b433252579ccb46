"""Our own files at the size at which they were made: small videos are saved larger, to be looked at.

A result's record is its note, and NAME.json beside it. Its entries "size" and "upscale" are the height and width in
pixels as made, and the factor by which each pixel was repeated. A file without such a record, or of other sides than
its record says, is what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minisora_jax.io.filesystem import json_or_none, open_regular
from minisora_jax.media.resize import resized

if TYPE_CHECKING:
    from minisora_jax.media.container import ContainerVideo, Fit
    from minisora_jax.media.opening import MediaFile
    from minisora_jax.media.picture import Picture

MOST_RECORD = 2**22  # bytes of a record that is read


class AsMade:
    """A saved video at the size at which it was made, with the attributes of `ContainerVideo`."""

    def __init__(self, content: ContainerVideo | Picture, size_HW: tuple[int, int], upscale: int):
        self._content, (self.height, self.width), self.upscale = content, size_HW, upscale
        self.timeline, self.sound, self.comment = content.timeline, content.sound, content.comment
        self.header_frames = content.header_frames
        made, saved = f"{self.height}x{self.width}", f"{content.height}x{content.width}"
        word = f"its record says that it was made at {made} pixels and saved at {saved}: it is read at {made}"
        self.remarks = [*content.remarks, word]

    def frames(self, start: float, fit: Fit | None) -> Iterator[tuple[float, Callable[[], np.ndarray]]]:
        """As `ContainerVideo.frames`."""
        size_HW = fit(self.height, self.width) if fit else (self.height, self.width)
        for stamp, saved in self._content.frames(start, None):
            yield stamp, lambda saved=saved: resized(self._averaged(saved())[None], size_HW)[0]

    def _averaged(self, frame_HWC: np.ndarray) -> np.ndarray:
        """Each pixel as the mean of its copies, which compression has changed a little."""
        H, W, k = self.height, self.width, self.upscale
        copies = frame_HWC[: H * k, : W * k].reshape(H, k, W, k, 3)
        return ((copies.sum((1, 3), dtype=np.uint32) + k * k // 2) // (k * k)).astype(np.uint8)


def as_made(file: MediaFile, content: ContainerVideo | Picture) -> ContainerVideo | Picture | AsMade:
    """The content at the size at which it was made, if a record of ours says that it was saved larger."""
    for text in (lambda: content.comment, lambda: _text_beside(file)):
        made = _size_of(json_or_none(text()))
        if made and _was_saved_so(*made, content.height, content.width):
            return AsMade(content, *made)
    return content


def _size_of(record: Any) -> tuple[tuple[int, int], int] | None:
    """((height, width), factor) that a record states."""
    if not isinstance(record, dict) or "minisora" not in record:
        return None
    size, upscale = record.get("size"), record.get("upscale")
    if not (isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in (*size, upscale))):
        return None
    return (size[0], size[1]), int(str(upscale))


def _was_saved_so(size_HW: tuple[int, int], upscale: int, H: int, W: int) -> bool:
    """Whether a file of H x W is the saved one: video formats gain a row or column where a side is odd."""
    whole = [side - made * upscale in (0, made * upscale % 2) for side, made in zip((H, W), size_HW)]
    return all(whole) and (H, W) != size_HW


def _text_beside(file: MediaFile) -> str:
    if isinstance(file, bytes):
        return ""
    try:
        with open_regular(Path(f"{file}.json")) as record:
            return record.read(MOST_RECORD).decode("utf-8", "replace")
    except (OSError, ValueError):
        return ""
