"""`minisora encode`: clips through the codec and captions through the text encoder, in order, for the latent cache."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from minisora_jax.io.retry import DataError
from minisora_jax.models.captions import Captions
from minisora_jax.models.codec import Codec
from minisora_jax.types import Clip, ClipSequence, LatentClip

WINDOW = 256  # clips looked at together at most, so that those of one size share a pass
WINDOW_BYTES = 2**30  # of their frames, at about which a window ends
PIXELS_AT_ONCE = 2**19  # H * W of a pass's clips together


def encode_clips(
    codec: Codec, captions: Captions, clips: ClipSequence, numbers: range
) -> Iterator[LatentClip | DataError]:
    """The latents of the clips of these numbers, in order; the error in the place of one that cannot be read.

    Clips of one size go through the codec together.
    """
    for window in _windows(clips, numbers):
        read = [clip for clip in window if not isinstance(clip, DataError)]
        texts = iter(captions.encode([clip.caption for clip in read]) if read else ())
        moments: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        by_size: dict[tuple, list[int]] = {}
        for i, clip in enumerate(window):
            if not isinstance(clip, DataError):
                by_size.setdefault(clip.frames_THWC.shape, []).append(i)
        for (_, H, W, _), members in by_size.items():
            batch = int(np.clip(PIXELS_AT_ONCE // (H * W), 1, 8))
            for some in (members[k : k + batch] for k in range(0, len(members), batch)):
                # Always full, so that one size is compiled once.
                padded = some + [some[-1]] * (batch - len(some))
                mean, std = codec.encode(np.stack([window[i].frames_THWC for i in padded]))
                moments |= {i: (mean[k], std[k]) for k, i in enumerate(some)}
        for i, clip in enumerate(window):
            if isinstance(clip, DataError):
                yield clip
            else:
                yield LatentClip(*moments[i], next(texts), clip.caption, clip.fps, clip.name)


def _windows(clips: ClipSequence, numbers: range) -> Iterator[list[Clip | DataError]]:
    """All clips in order. Where a window ends is a function of the clips, and so are the passes and their bytes."""
    window, held = [], 0
    for i in numbers:
        clip = _read(clips, i)
        window.append(clip)
        held += 0 if isinstance(clip, DataError) else clip.frames_THWC.nbytes
        if len(window) == WINDOW or held >= WINDOW_BYTES:
            yield window
            window, held = [], 0
    if window:
        yield window


def _read(clips: ClipSequence, i: int) -> Clip | DataError:
    try:
        return clips[i]
    except DataError as error:
        return error
