"""Resize a video frame by frame."""

from __future__ import annotations

import numpy as np
from PIL import Image


def resized(frames_THWC: np.ndarray, size_HW: tuple[int, int]) -> np.ndarray:
    """uint8 frames (T, H, W, 3) at another height and width in pixels, bicubic; the aspect ratio is not kept."""
    H, W = size_HW
    if frames_THWC.shape[1:3] == (H, W):
        return frames_THWC
    resize = lambda frame_HWC: Image.fromarray(frame_HWC).resize((W, H), Image.Resampling.BICUBIC)
    return np.stack([np.asarray(resize(frame_HWC)) for frame_HWC in frames_THWC])
