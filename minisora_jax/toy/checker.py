"""Check whether a video matches its caption: colour, shape, motion and permanence, from the pixels.

The checker uses the palette, the shapes and the grammar of toy/grammar.py, but not the scene of a clip. So it works the
same on true, reconstructed and generated clips.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable

import numpy as np

from minisora_jax.toy.grammar import (
    BACKGROUNDS,
    CHECKER,
    CHECKER_CELL,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    WALL,
    parse_caption,
)
from minisora_jax.toy.shapes import distance

NAMES = [*COLOURS, "wall", *BACKGROUNDS, "dark", "light"]
PALETTE = np.array([*COLOURS.values(), WALL, *BACKGROUNDS.values(), *CHECKER], np.float32)  # the colour of each name
_OBJECTS = len(COLOURS)
_WALL = NAMES.index("wall")
LEAST_PIXELS = 8.0  # an object with fewer pixels in a frame is not visible there
USUAL_SIDE = 64  # pixels; thresholds of motion grow with frames that are larger


@dataclasses.dataclass(frozen=True)
class Observation:
    """One object as the pixels show it."""

    colour: str
    shape: str
    motion: str  # one of shapes.MOTIONS; "unclear" if none fits
    visible_T: np.ndarray  # bool
    returns: bool  # it is visible, then hidden, then visible again
    path_T2: np.ndarray  # (x, y) of its centre in pixels, valid where it is visible


def check(frames_THWC: np.ndarray, caption: str) -> dict[str, bool]:
    """For "colour", "shape", "motion" and "permanence": whether every object of the caption has it in the video.

    Images have no "motion". Only clips with a wall have "permanence".

    Args:
        frames_THWC: uint8 RGB.

    Raises:
        ValueError: the caption is outside the grammar of toy/grammar.py.
    """
    return verdict_on(observe(frames_THWC, len(parse_caption(caption)[0])), caption)


def verdict_on(observed: list[Observation], caption: str) -> dict[str, bool]:
    """`check` of what `observe` found."""
    expected, _, is_image = parse_caption(caption)
    by_colour = {o.colour: o for o in observed}
    # An object of a wrong colour still counts for shape and motion; such objects are matched in order of size.
    spare = iter([o for o in observed if o.colour not in {e.colour for e in expected}])
    matches = [by_colour.get(e.colour) or next(spare, None) for e in expected]
    verdict = {
        "colour": all(o is not None and o.colour == e.colour for e, o in zip(expected, matches)),
        "shape": all(o is not None and o.shape == e.shape for e, o in zip(expected, matches)),
    }
    if not is_image:
        verdict["motion"] = all(o is not None and o.motion == e.motion for e, o in zip(expected, matches))
    if expected[0].motion.startswith("hide"):
        first = matches[0]
        verdict["permanence"] = first is not None and first.returns and first.colour == expected[0].colour
    return verdict


def check_all(
    videos: Iterable[np.ndarray], captions: Iterable[str]
) -> tuple[dict[str, list[bool]], dict[str, list[bool]], list[str]]:
    """`check` of many videos: (verdicts by attribute, verdicts on motion by kind of motion, errors of each video).

    The errors of a video are its wrong attributes, such as "shape, motion"; "" for none.
    """
    hits, by_motion, errors = collections.defaultdict(list), collections.defaultdict(list), []
    for frames_THWC, caption in zip(videos, captions, strict=True):
        verdict = check(frames_THWC, caption)
        for attribute, good in verdict.items():
            hits[attribute].append(good)
        if "motion" in verdict:
            by_motion[parse_caption(caption)[0][0].motion].append(verdict["motion"])
        errors.append(", ".join(k for k, good in verdict.items() if not good))
    return hits, dict(sorted(by_motion.items())), errors


def observe(frames_THWC: np.ndarray, count: int = 1) -> list[Observation]:
    """The `count` most prominent objects of a clip, largest first; fewer if fewer are visible."""
    x = frames_THWC.astype(np.float32)
    gap = palette_distances(x)
    nearest = np.argmin(gap, axis=-1)
    sure = (np.min(gap, axis=-1) < 70.0) & (nearest < _OBJECTS)
    totals = np.bincount(nearest[sure], minlength=_OBJECTS)[:_OBJECTS]
    order = np.argsort(-totals)[:count]
    colours = [int(c) for c in order if totals[c] >= max(LEAST_PIXELS, 0.12 * totals[order[0]])]
    wall = float(np.mean(nearest == _WALL)) > 0.06
    background = plain_background(x, nearest)
    return [_describe(x, c, [o for o in colours if o != c], background, wall) for c in colours]


def palette_distances(x_THWC: np.ndarray) -> np.ndarray:
    """The distance of each float RGB pixel to each colour of the palette: (T, H, W, names)."""
    squares = (x_THWC * x_THWC).sum(-1, keepdims=True) - 2 * x_THWC @ PALETTE.T + (PALETTE**2).sum(-1)
    return np.sqrt(np.maximum(squares, 0.0))


def plain_background(x: np.ndarray, nearest: np.ndarray) -> np.ndarray:
    """The median colour (3,) of the pixels that are neither object nor wall."""
    plain = nearest > _WALL
    return np.median(x[plain], axis=0) if plain.any() else np.median(x.reshape(-1, 3), axis=0)


def _describe(x: np.ndarray, colour: int, others: list[int], background: np.ndarray, wall: bool) -> Observation:
    own = PALETTE[colour]
    # Coverage: the position of a pixel between the background (0) and the object's colour (1).
    way = own - background
    cover = np.clip((x - background) @ way / (way @ way), 0.0, 1.0)
    rivals = np.stack([PALETTE[o] for o in others] + ([PALETTE[_WALL]] if wall else []) + [own])
    is_rival = np.argmin(np.linalg.norm(x[..., None, :] - rivals, axis=-1), axis=-1) < len(rivals) - 1
    off_line = np.linalg.norm(x - (background + cover[..., None] * way), axis=-1)
    cover = np.where(is_rival | (off_line > 75.0), 0.0, cover)
    cover = _near_the_blob(np.where(cover > 0.3, cover, 0.0))
    area_T = cover.sum((1, 2))
    visible_T = area_T > max(LEAST_PIXELS, 0.12 * area_T.max())
    H, W = x.shape[1:3]
    y, xx = np.mgrid[0:H, 0:W] + 0.5
    safe = np.maximum(area_T, 1e-6)
    path = np.stack([(cover * xx).sum((1, 2)) / safe, (cover * y).sum((1, 2)) / safe], axis=-1)
    motion, returns = _motion(x, cover, path, area_T, visible_T, wall)
    is_wall = np.linalg.norm(x - PALETTE[_WALL], axis=-1) < 40.0
    shape = _shape(cover, path, area_T, visible_T, (is_wall.mean((0, 1)) > 0.5) if wall else np.zeros(W, bool))
    return Observation(NAMES[colour], shape, motion, visible_T, returns, path)


def _near_the_blob(cover_THW: np.ndarray) -> np.ndarray:
    """The coverage without specks far from the frame's main blob."""
    T, H, W = cover_THW.shape
    y, x = np.mgrid[0:H, 0:W] + 0.5
    box = _blur(cover_THW, 2)
    peak = box.reshape(T, -1).argmax(1)
    py, px = (peak // W + 0.5)[:, None, None], (peak % W + 0.5)[:, None, None]
    radius = np.sqrt(np.maximum(cover_THW.sum((1, 2)), 4.0))[:, None, None]
    return np.where(np.hypot(x - px, y - py) < 1.6 * radius + 2.0, cover_THW, 0.0)


def _blur(image: np.ndarray, k: int) -> np.ndarray:
    """The mean over (2k + 1)^2 neighbours of an image (..., H, W)."""
    sums = np.pad(image, [(0, 0)] * (image.ndim - 2) + [(k + 1, k)] * 2).cumsum(-2).cumsum(-1)
    n = 2 * k + 1
    return (sums[..., n:, n:] - sums[..., :-n, n:] - sums[..., n:, :-n] + sums[..., :-n, :-n]) / n**2


def _shape(cover: np.ndarray, path: np.ndarray, area_T: np.ndarray, visible_T: np.ndarray, wall_W: np.ndarray) -> str:
    """The shape whose drawing at the blob's place overlaps the blob best, over the frames that show it whole.

    Drawings of three sizes are tried, sharp and blurred, since a codec or a model may soften edges and corners.
    """
    clear = visible_T & (area_T >= 0.6 * area_T.max())
    if wall_W.any():  # use frames where the wall does not cover the blob
        to_wall = np.abs(path[:, :1] - (np.flatnonzero(wall_W) + 0.5)).min(1)
        reach = 1.2 * np.sqrt(np.median(area_T[clear]) / 2.2) + 1.0
        clear &= (to_wall > reach) | (to_wall >= to_wall[visible_T].max() - 1.0)
    clear = np.flatnonzero(clear)
    if len(clear) == 0:
        return "unclear"
    H, W = cover.shape[1:]
    y, x = np.mgrid[0:H, 0:W] + 0.5
    dx, dy = x[None] - path[clear, 0, None, None], y[None] - path[clear, 1, None, None]
    c, scores = cover[clear], {}
    for shape in SHAPES:
        radius = np.sqrt(area_T[clear] / _UNIT_AREA[shape])[:, None, None]
        overlaps = []
        for scale in (0.92, 1.0, 1.08):
            sharp = np.clip(0.5 - distance(shape, dx, dy, radius * scale), 0.0, 1.0)
            for drawn in (sharp, _blur(sharp, 1), _blur(_blur(sharp, 1), 1)):
                overlaps.append(np.minimum(drawn, c).sum((1, 2)) / np.maximum(drawn, c).sum((1, 2)))
        scores[shape] = float(np.mean(np.max(overlaps, axis=0)))
    best = max(scores, key=lambda shape: scores[shape])
    return best if scores[best] > 0.6 else "unclear"


def _unit_area(shape: str) -> float:
    y, x = np.mgrid[-2:2:400j, -2:2:400j]
    return float(np.mean(distance(shape, x, y, 1.0) < 0) * 16.0)


_UNIT_AREA = {shape: _unit_area(shape) for shape in SHAPES}


def _motion(
    x: np.ndarray, cover: np.ndarray, path: np.ndarray, area_T: np.ndarray, visible_T: np.ndarray, wall: bool
) -> tuple[str, bool]:
    """(the name of the motion, whether the object is hidden and then visible again)."""
    seen = np.flatnonzero(visible_T)
    if len(seen) < 2:
        return "unclear", False
    pixel = max(1.0, min(x.shape[1:3]) / USUAL_SIDE)
    hidden = bool((~visible_T[seen[0] : seen[-1] + 1]).any())
    track, time = path[seen], seen.astype(float)
    slope = np.polyfit(time, track, 1)[0]
    way = slope * (time[-1] - time[0])  # fitted displacement, pixels
    if wall:
        direction = "right" if way[0] > 0 else "left"
        whole = hidden and abs(way[0]) > 0.3 * x.shape[2] and abs(way[1]) < 0.35 * abs(way[0])
        return (f"hide-{direction}" if whole else "unclear"), hidden
    scroll = _texture_scroll(x, cover)
    if abs(scroll) > 3.0 * pixel and abs(way[0] - scroll) < max(3.5 * pixel, 0.4 * abs(scroll)):
        return ("pan-left" if scroll > 0 else "pan-right"), hidden
    if len(seen) >= 6 and _turn(track / pixel) > 1.25 * np.pi:
        return "orbit", hidden
    # It bounces if it comes back along an axis.
    steps = np.diff(track, axis=0)
    for axis in (0, 1):
        forth = np.abs(steps[:, axis]).sum()
        net = abs(steps[:, axis].sum())
        if forth > 6.0 * pixel and forth - net > max(0.3 * forth, 4.0 * pixel):
            return "bounce", hidden
    radius = np.sqrt(area_T[seen])
    fit = np.polyval(np.polyfit(time, radius, 1), time[[0, -1]])
    ratio = fit[1] / max(fit[0], 1e-3)
    length = float(np.hypot(*way))
    if (ratio > 1.3 or ratio < 1 / 1.3) and length < max(4.0 * pixel, 0.25 * max(x.shape[1:3])):
        return ("grow" if ratio > 1 else "shrink"), hidden
    if length < 2.2 * pixel:
        return "still", hidden
    if length < 2.8 * pixel:
        return "unclear", hidden
    unit = way / length
    return max(DIRECTIONS, key=lambda d: float(unit @ np.array(DIRECTIONS[d]) / np.hypot(*DIRECTIONS[d]))), hidden


def _turn(track: np.ndarray) -> float:
    """The angle in radians that a path (T, 2) turns around the circle fitted to it (Kasa 1976); 0 for no circle."""
    away = track - track.mean(0)
    if np.hypot(*np.ptp(away, axis=0)) < 3.0:
        return 0.0
    (x, y, rest), *_ = np.linalg.lstsq(np.c_[2 * away, np.ones(len(away))], (away**2).sum(1), rcond=None)
    radius = np.sqrt(max(rest + x * x + y * y, 1e-9))
    spoke = away - (x, y)
    if np.std(np.hypot(*spoke.T)) > 0.3 * radius:
        return 0.0
    angle = np.unwrap(np.arctan2(spoke[:, 1], spoke[:, 0]))
    return abs(angle[-1] - angle[0])


def _texture_scroll(x: np.ndarray, cover: np.ndarray) -> float:
    """The pixels by which a checkered background moves rightwards over the clip; 0 for another background.

    Cells of CHECKER_CELL pixels and of 2, 4, ... times that are tried, since frames may be upscaled.
    """
    T, H, W = cover.shape
    grey = x.mean(-1)
    free = cover < 0.05
    centred = np.where(free, grey - np.median(grey[free]) if free.any() else 0.0, 0.0)
    waves, cell = {}, CHECKER_CELL
    while not waves or 4 * cell <= min(H, W):
        rows = np.sin((np.arange(H) + 0.5) * np.pi / cell)
        columns = np.exp(-1j * (np.arange(W) + 0.5) * np.pi / cell)
        waves[cell] = np.einsum("thw,h,w->t", np.clip(centred, -30, 30), rows, columns) / (H * W)
        cell *= 2
    strength, cell = max((float(np.median(np.abs(wave))), cell) for cell, wave in waves.items())
    if strength < 2.0:  # a full checker of these tones gives about 8
        return 0.0
    phase = np.unwrap(np.angle(waves[cell]))
    return float(-(phase[-1] - phase[0]) * cell / np.pi)
