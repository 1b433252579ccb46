"""Find ghosts: frames in which an object is half transparent, doubled, missing, or jumps to another place.

A cross-fade of two videos passes every measure of the steps between frames, and a person sees two ghosts in it. This
module looks at each frame as a person does. It uses the palette of toy/grammar.py, but not the scene of a clip.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from minisora_jax.toy.checker import LEAST_PIXELS, NAMES, PALETTE, palette_distances, plain_background
from minisora_jax.toy.grammar import COLOURS

FAINT = 0.25  # pixels at least so far on the way from the background to an object's colour belong to a blob
OPAQUE = 0.7  # the least coverage in the middle of an object that is not transparent
HAZE = 0.05  # the largest share of half transparent pixels that are not at an edge
LEAST_AREA = 0.15  # a blob with less of the object's usual area is a speck
JUMP = 0.22  # the longest step of an object's centre between two frames, in shorter sides of the frame
FAULTS = ("missing", "doubled", "transparent", "jump", "stranger")


def ghosts(frames_THWC: np.ndarray, colours: Sequence[str], *, loop: bool = False) -> dict[str, list[int]]:
    """The frames with each of `FAULTS`; {} for a video in which each object is one opaque thing on one path.

    Args:
        frames_THWC: uint8 RGB; the objects are visible in all frames.
        colours: the colour of each object, all different.
        loop: the first frame follows the last one.
    """
    x = frames_THWC.astype(np.float32)
    distances = palette_distances(x)
    background = plain_background(x, np.argmin(distances, axis=-1))
    faults: dict[str, list[int]] = collections.defaultdict(list)
    areas = []
    for colour in colours:
        rivals = [PALETTE[NAMES.index(other)] for other in colours if other != colour]
        cover_THW = _coverage(x, PALETTE[NAMES.index(colour)], background, rivals)
        areas.append(float(np.median(cover_THW.sum((1, 2)))))
        centres = [_object(cover_HW, areas[-1], t, faults) for t, cover_HW in enumerate(cover_THW)]
        _jumps(np.array(centres), JUMP * min(x.shape[1:3]), loop, faults)
    _strangers(distances, colours, max(0.3 * min(areas), 2 * LEAST_PIXELS), faults)
    return {fault: sorted(set(faults[fault])) for fault in FAULTS if faults[fault]}


def _coverage(x: np.ndarray, own: np.ndarray, background: np.ndarray, rivals: list[np.ndarray]) -> np.ndarray:
    """(T, H, W): how far each pixel is on the way from the background to the object's colour; 0 off that way."""
    way = own - background
    cover = np.clip((x - background) @ way / (way @ way), 0.0, 1.0)
    off_way = np.linalg.norm(x - (background + cover[..., None] * way), axis=-1)
    for rival in rivals:  # a pixel nearer to the way to another object is that object's
        other = rival - background
        share = np.clip((x - background) @ other / (other @ other), 0.0, 1.0)
        cover = np.where(np.linalg.norm(x - (background + share[..., None] * other), axis=-1) < off_way, 0.0, cover)
    return np.where((off_way < 45.0) & (cover >= FAINT), cover, 0.0)


def _object(cover_HW: np.ndarray, usual_area: float, t: int, faults: dict[str, list[int]]) -> tuple[float, float]:
    """The centre of the largest blob of frame t; its faults are added."""
    blobs, areas = _blobs(cover_HW)
    least = max(LEAST_PIXELS, LEAST_AREA * usual_area)
    large = 1 + np.flatnonzero(areas >= least)
    if not len(large):
        faults["missing"].append(t)
        return np.nan, np.nan
    if len(large) > 1:
        faults["doubled"].append(t)
    middle = ndimage.uniform_filter(cover_HW, 2)
    haze = ndimage.binary_erosion((cover_HW > 0) & (cover_HW < OPAQUE), np.ones((3, 3))).sum()
    if haze > HAZE * usual_area or any(middle[blobs == blob].max() < OPAQUE for blob in large):
        faults["transparent"].append(t)
    y, x = np.nonzero(blobs == 1 + int(np.argmax(areas)))
    return float(np.average(y, weights=cover_HW[y, x])), float(np.average(x, weights=cover_HW[y, x]))


def _blobs(weight_HW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the number of each pixel's blob, 0 for none; the weight of blobs 1, 2, ...)."""
    numbers_HW = np.zeros(weight_HW.shape, np.int32)
    ndimage.label(weight_HW > 0, np.ones((3, 3)), output=numbers_HW)
    return numbers_HW, np.bincount(numbers_HW.reshape(-1), weight_HW.reshape(-1))[1:]


def _jumps(centres_T2: np.ndarray, longest: float, loop: bool, faults: dict[str, list[int]]) -> None:
    following = np.roll(centres_T2, -1, axis=0) if loop else centres_T2[1:]
    steps = np.linalg.norm(following - centres_T2[: len(following)], axis=-1)
    faults["jump"] += np.flatnonzero(steps > longest).tolist()


def _strangers(distances: np.ndarray, colours: Sequence[str], least: float, faults: dict[str, list[int]]) -> None:
    """Frames with a blob of a colour that no object of the caption has."""
    nearest, sure = np.argmin(distances, axis=-1), np.min(distances, axis=-1) < 60.0
    for colour in COLOURS:
        if colour not in colours:
            of_colour = sure & (nearest == NAMES.index(colour))
            for t in np.flatnonzero(of_colour.sum((1, 2)) >= least):
                if _blobs(of_colour[t])[1].max() >= least:
                    faults["stranger"].append(int(t))
