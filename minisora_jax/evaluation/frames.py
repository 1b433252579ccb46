"""What frames tell without knowing what they show: steps from one to the next, seams, flicker, likeness.

A step is the mean absolute difference of two frames, in levels of 255.
"""

from __future__ import annotations

import numpy as np

from minisora_jax.generate.frame_ops import STILL, steps
from minisora_jax.toy.checker import Observation


def step(a_HWC: np.ndarray, b_HWC: np.ndarray) -> float:
    return float(np.abs(a_HWC.astype(np.float32) - b_HWC).mean())


def seam(frames_THWC: np.ndarray) -> float:
    """Of a loop: the step from its last frame to its first, in median steps."""
    return step(frames_THWC[-1], frames_THWC[0]) / max(float(np.median(steps(frames_THWC))), STILL)


def psnr(a_THWC: np.ndarray, b_THWC: np.ndarray) -> float:
    """In dB; 99 for the same pixels."""
    error = np.mean((a_THWC.astype(np.float32) - b_THWC) ** 2)
    return 99.0 if error == 0 else float(10 * np.log10(255.0**2 / error))


def flicker(frames_THWC: np.ndarray) -> float:
    """How much pixels that do not change from frame t - 1 to t + 1 differ at t: levels of 255, the mean over them."""
    x = frames_THWC.astype(np.float32)
    if len(x) < 3:
        return 0.0
    same = np.abs(x[2:] - x[:-2]).max(-1) < 4.0
    apart = np.abs(x[1:-1] - 0.5 * (x[2:] + x[:-2])).mean(-1)
    return float(apart[same].mean()) if same.any() else 0.0


def bounce(seen: Observation) -> float | None:
    """How evenly a bouncing object goes: the standard deviation of its speed, in mean speeds, along the axis on which
    it turns back, the steps into and out of a turn left out. None where no turn is seen."""
    t = np.flatnonzero(seen.visible_T)
    if len(t) < 6 or (np.diff(t) != 1).any():
        return None
    way = np.diff(seen.path_T2[t], axis=0)
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
