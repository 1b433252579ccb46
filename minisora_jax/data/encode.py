"""Encode clips with the codec and captions with the text encoder, for the latent cache (`minisora encode`)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from minisora_jax.data.given_frames import FrameEncoder
from minisora_jax.io.retry import DataError
from minisora_jax.models.captions import Captions
from minisora_jax.models.codec import Codec
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
    for window in _windows(clips, numbers):
        window = [_fitting(clip, given) for clip in window]
        readable = {i: clip for i, clip in enumerate(window) if not isinstance(clip, DataError)}
        texts = iter(captions.encode([clip.caption for clip in readable.values()]) if readable else ())
        moments: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        frames: dict[int, GivenFrames] = {}
        by_size: dict[tuple, list[int]] = {}
        for i, clip in readable.items():
            by_size.setdefault(clip.frames_THWC.shape, []).append(i)
        for (_, H, W, _), members in by_size.items():
            batch = int(np.clip(PIXELS_AT_ONCE // (H * W), 1, 8))
            for indices in (members[k : k + batch] for k in range(0, len(members), batch)):
                # Always a full batch, so that each size is compiled once.
                padded = indices + [indices[-1]] * (batch - len(indices))
                frames_BTHWC = np.stack([readable[i].frames_THWC for i in padded])
                mean, std = codec.encode(frames_BTHWC)
                moments |= {i: (mean[k], std[k]) for k, i in enumerate(indices)}
                if given:
                    frames |= zip(indices, given.encode(frames_BTHWC))
        for i, clip in enumerate(window):
            if isinstance(clip, DataError):
                yield clip
            else:
                yield LatentClip(*moments[i], next(texts), clip.caption, clip.fps, clip.name, frames.get(i))


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
