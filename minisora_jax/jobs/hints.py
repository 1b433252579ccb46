"""What a model cannot be expected to do with a job, said before anything is sampled. Words: `unknown_words_hint`."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np

from minisora_jax.generate.pipeline import VideoPipeline
from minisora_jax.media.opening import VideoError
from minisora_jax.media.video import read_clip_frames

STRANGE = 24.0  # dB: the bundled codec reproduces pictures of its world with 28 and more, photos with 15 to 21
LOOKED_AT = (48, 48)  # pixels at which a picture is looked at


def picture_hints(pipeline: VideoPipeline, paths: Sequence[str]) -> list[str]:
    """A sentence for each given picture or video that is not of the bundled model's world of coloured shapes.

    The codec tells: it reproduces only pictures like those that it was trained on. What other models know is not known.
    """
    if pipeline.vocabulary is None:
        return []
    measured = {path: _reproduced(pipeline, path) for path in dict.fromkeys(paths)}
    return [
        f"{path} is not of the world of the bundled model, which knows flat coloured shapes only: its codec reproduces "
        f"this picture with {decibels:.1f} dB, and those of its world with 28 dB and more. Expect little of it."
        for path, decibels in measured.items()
        if decibels < STRANGE
    ]


def _reproduced(pipeline: VideoPipeline, path: str) -> float:
    """PSNR of a file's first picture after the codec; infinite if it cannot be read, which is said elsewhere."""
    with contextlib.suppress(VideoError):
        frames_THWC, _ = read_clip_frames(path, max_frames=1, fit=lambda H, W: LOOKED_AT, made=True)
        [latents] = pipeline.encode([frames_THWC])
        [again_THWC] = pipeline.decode([latents])
        error = np.mean((again_THWC.astype(np.float32) - frames_THWC) ** 2)
        return 20 * np.log10(255.0) - 10 * np.log10(max(float(error), 1e-9))
    return float("inf")


def size_hint(pipeline: VideoPipeline, size_HW: tuple[int, int] | None) -> str:
    """A sentence if frames of that size are beyond those of training, so that they are upscaled; "" otherwise."""
    known = pipeline.known_size
    if not (size_HW and known) or (size_HW[0] <= known[1] and size_HW[1] <= known[2]):
        return ""
    H, W = (-(-n // pipeline.cell) * pipeline.cell for n in size_HW)
    _, native_H, native_W = pipeline.sizes_up_to((known[0], H, W))[0]
    return (
        f"{size_HW[0]}x{size_HW[1]} is beyond the {known[1]}x{known[2]} pixels of training: it is made at "
        f"{native_H}x{native_W} and upscaled, which adds sharpness but no detail."
    )
