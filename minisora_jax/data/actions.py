"""Actions of clips, as models read them: one vector for each latent frame.

    [action of frame 1, ..., action of frame f, 1]     f pixel frames make a latent frame
    [0, ..., 0, action of frame 0, 1]                  the first latent frame is one frame of pixels
    [0, ..., 0, 0]                                     not known: a clip without actions, or dropped for guidance

The action of a frame is the one that led to it, so that of a clip's first frame is zeros.
"""

from __future__ import annotations

import numpy as np


def action_width(columns: int, time_factor: int) -> int:
    """The length of a latent frame's vector (`DiTConfig.action_width`), for actions of so many columns."""
    return columns * time_factor + 1


def frames_of_latent(frames: int, latent_frames: int) -> int:
    """f, the frames of pixels of a latent frame after the first, where 1 + f (t - 1) of them make t latent frames.

    Raises:
        ValueError: The frames do not divide so.
    """
    f, rest = divmod(frames - 1, latent_frames - 1) if latent_frames > 1 else (1, frames - 1)
    if f < 1 or rest:
        raise ValueError(
            f"actions of {frames} frames do not fit {latent_frames} latent frames, 1 + f x {latent_frames - 1}"
        )
    return f


def by_latent_frame(actions_TA: np.ndarray, latent_frames: int) -> np.ndarray:
    """The vectors of all latent frames, float32 (t, x), of the actions of all pixel frames, T = 1 + f (t - 1).

    Raises:
        ValueError: T frames do not divide so.
    """
    T, A = actions_TA.shape
    f = frames_of_latent(T, latent_frames)
    padded_TA = np.concatenate([np.zeros((f - 1, A), np.float32), actions_TA.astype(np.float32)])
    return np.concatenate([padded_TA.reshape(latent_frames, f * A), np.ones((latent_frames, 1), np.float32)], axis=1)
