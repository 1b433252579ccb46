"""Measurements of frames that need no caption: steps between frames, seams, flicker, PSNR.

A step is the mean absolute difference of two frames, on the scale 0 to 255.
"""

from __future__ import annotations

import numpy as np

from minisora_jax.generate.frame_ops import STILL, steps
from minisora_jax.toy.checker import Observation


def step(a_HWC: np.ndarray, b_HWC: np.ndarray) -> float:
    """The step between two frames."""
    return float(np.abs(a_HWC.astype(np.float32) - b_HWC).mean())


def seam(frames_THWC: np.ndarray) -> float:
    """The step from the last frame of a loop to its first, divided by the median step."""
    return step(frames_THWC[-1], frames_THWC[0]) / max(float(np.median(steps(frames_THWC))), STILL)


def psnr(a_THWC: np.ndarray, b_THWC: np.ndarray) -> float:
    """The peak signal-to-noise ratio in dB; 99 for equal pixels."""
    error = np.mean((a_THWC.astype(np.float32) - b_THWC) ** 2)
    return 99.0 if error == 0 else float(10 * np.log10(255.0**2 / error))


def flicker(frames_THWC: np.ndarray) -> float:
    """The mean difference at frame t of the pixels that do not change from frame t - 1 to t + 1; scale 0 to 255."""
    x = frames_THWC.astype(np.float32)
    if len(x) < 3:
        return 0.0
    unchanged = np.abs(x[2:] - x[:-2]).max(-1) < 4.0
    difference = np.abs(x[1:-1] - 0.5 * (x[2:] + x[:-2])).mean(-1)
    return float(difference[unchanged].mean()) if unchanged.any() else 0.0


def bounce(observation: Observation) -> float | None:
    """The standard deviation of a bouncing object's speed, divided by its mean speed; None if it never turns back.

    The speed is along the axis on which the object turns back, without the steps into and out of a turn.
    """
    t = np.flatnonzero(observation.visible_T)
    if len(t) < 6 or (np.diff(t) != 1).any():
        return None
    way = np.diff(observation.path_T2[t], axis=0)
    axis = int(np.argmax(np.abs(way).sum(0) - np.abs(way.sum(0))))
    v = way[:, axis]
    turn = np.flatnonzero(np.sign(v[1:]) != np.sign(v[:-1]))
    if not len(turn):
        return None
    free = np.ones(len(v), bool)
    for n in turn:
        free[max(n, 0) : n + 2] = False
    speed = np.abs(v[free])
    return float(speed.std() / max(speed.mean(), 1e-3)) if len(speed) >= 3 else None
