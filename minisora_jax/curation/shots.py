"""Find the shots of a film with PySceneDetect's adaptive detector, frame by frame while decoding.

A cut is a frame whose difference in hue, saturation and luma to the frame before is at least `THRESHOLD` times the mean
difference of its neighbours (so fast camera motion is no cut), and at least `LEAST`.
See https://www.scenedetect.com/docs/latest/api/detectors.html
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from minisora_jax.curation.filters import curate_module

THRESHOLD, LEAST, WINDOW = 3.0, 15.0, 2  # PySceneDetect's own defaults
SHORTEST = 5  # frames of a shot; cuts at a smaller distance are flashes
WIDTH = 256  # frames are shrunk to this width in pixels before they are compared


def check() -> None:
    """Import the needed packages; ImportError with the command that installs a missing one."""
    curate_module("scenedetect", "the shot cut")
    curate_module("cv2", "the shot cut")


def find_shots(frames: Iterable[np.ndarray], fps: float) -> list[tuple[int, int]]:
    """The shots of a film as ranges of frame numbers [start, end) without gaps.

    Args:
        frames: uint8 RGB (H, W, 3) each.
        fps: frames per second.
    """
    cv2 = curate_module("cv2", "the shot cut")
    from scenedetect import AdaptiveDetector, FrameTimecode

    detector = AdaptiveDetector(
        adaptive_threshold=THRESHOLD, min_scene_len=SHORTEST, window_width=WINDOW, min_content_val=LEAST
    )
    cuts, count = [], 0
    for frame in frames:
        height, width = frame.shape[:2]
        if width > WIDTH:
            size = (WIDTH, max(1, round(height * WIDTH / width)))
            frame = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
        cuts += detector.process_frame(FrameTimecode(count, fps), cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        count += 1
    ends = sorted({0, count, *(cut.frame_num for cut in cuts)})
    return list(zip(ends, ends[1:]))


def pieces(shots: list[tuple[int, int]], max_frames: int) -> list[tuple[int, int]]:
    """The shots, with those longer than `max_frames` cut into pieces of `max_frames`; the last piece may be shorter."""
    return [(at, min(at + max_frames, end)) for start, end in shots for at in range(start, end, max_frames)]
