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


def by_latent_frame(actions_TA: np.ndarray, latent_frames: int) -> np.ndarray:
    """The vectors of all latent frames, float32 (t, x), of the actions of all pixel frames, T = 1 + f (t - 1).

    Raises:
        ValueError: T frames do not divide so.
    """
    T, A = actions_TA.shape
    if T < latent_frames or (T - 1) % max(latent_frames - 1, 1) or (latent_frames == 1) != (T == 1):
        raise ValueError(f"actions of {T} frames do not fit {latent_frames} latent frames, 1 + f x {latent_frames - 1}")
    f = (T - 1) // (latent_frames - 1) if latent_frames > 1 else 1
    padded_TA = np.concatenate([np.zeros((f - 1, A), np.float32), actions_TA.astype(np.float32)])
    return np.concatenate([padded_TA.reshape(latent_frames, f * A), np.ones((latent_frames, 1), np.float32)], axis=1)
