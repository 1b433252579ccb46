"""Encode clips with the codec and captions with the text encoder, for the latent cache (`minisora encode`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from minisora_jax.data.given_frames import FrameEncoder
from minisora_jax.io.retry import DataError
from minisora_jax.models.captions import Captions
from minisora_jax.models.codec import Codec, by_size
from minisora_jax.types import Clip, ClipSequence, GivenFrames, LatentClip

WINDOW = 256  # at most so many clips are in memory; those of one size share passes of the codec
WINDOW_BYTES = 2**30  # a window ends at about so many bytes of frames
PIXELS_AT_ONCE = 2**19  # sum of H * W over the clips of one pass


def encode_clips(
    codec: Codec, captions: Captions, clips: ClipSequence, numbers: range, given: FrameEncoder | None = None
) -> Iterator[LatentClip | DataError]:
    """The latents of the clips with these numbers, in order. A clip that cannot be used yields its error instead.

    Clips of one size share passes of the codec.
    """
    at_once = lambda size_THWC: int(np.clip(PIXELS_AT_ONCE // (size_THWC[1] * size_THWC[2]), 1, 8))

    def encoded(same_size: list[np.ndarray], _: Any) -> Iterator[tuple[np.ndarray, np.ndarray, GivenFrames | None]]:
        frames_BTHWC = np.stack(same_size)
        mean, std = codec.encode(frames_BTHWC)
        return zip(mean, std, given.encode(frames_BTHWC) if given else [None] * len(mean))

    for window in _windows(clips, numbers):
        window = [_fitting(clip, given) for clip in window]
        usable = [clip for clip in window if isinstance(clip, Clip)]
        texts = iter(captions.encode([clip.caption for clip in usable]) if usable else ())
        pixels = [clip.frames_THWC for clip in usable]
        results = iter(by_size(encoded, pixels, [x.shape for x in pixels], full=True, at_once=at_once))
        for clip in window:
            if isinstance(clip, DataError):
                yield clip
            else:
                mean, std, frames = next(results)
                yield LatentClip(mean, std, next(texts), clip.caption, clip.fps, clip.name, frames, clip.actions_TA)


def _windows(clips: ClipSequence, numbers: range) -> Iterator[list[Clip | DataError]]:
    """The clips in order, in windows. The windows, and so the bytes of the latents, depend on the clips only."""
    window, nbytes = [], 0
    for i in numbers:
        clip = _read(clips, i)
        window.append(clip)
        nbytes += 0 if isinstance(clip, DataError) else clip.frames_THWC.nbytes
        if len(window) == WINDOW or nbytes >= WINDOW_BYTES:
            yield window
            window, nbytes = [], 0
    if window:
        yield window


def _read(clips: ClipSequence, i: int) -> Clip | DataError:
    try:
        return clips[i]
    except DataError as error:
        return error


def _fitting(clip: Clip | DataError, given: FrameEncoder | None) -> Clip | DataError:
    """The clip, or the reason why it teaches nothing: all its frames are given."""
    if given and isinstance(clip, Clip) and not given.leaves_some(len(clip.frames_THWC)):
        return DataError(f"{clip.name} has {len(clip.frames_THWC)} frames, and --given={given.kind} gives all of them")
    return clip
