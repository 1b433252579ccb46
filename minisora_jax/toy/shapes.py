"""The procedural data set: captioned clips of coloured shapes in motion, drawn on demand.

Clip i of a split is a pure function of (split, i). Clips have 32 to 64 pixels a side, 1 to 17 frames at 8 frames per
second, one or two objects, and a plain or checkered background. Objects stay, move in eight directions, bounce off the
frame, grow, shrink, move in a circle, slide by as the camera pans, or pass behind a wall and come back.

    train        no object of any clip has a held-out (colour, shape, motion) triple
    heldout      every clip has such an object: training contains its words, but not their combination
    transitions  two clips of one training caption, and the way between them (toy/transitions.py)
    arrivals     the end of a training clip whose objects then stay where they are (toy/transitions.py)
"""

from __future__ import annotations

import numpy as np

from minisora_jax.toy.grammar import BACKGROUNDS, CHECKER, CHECKER_CELL, COLOURS, FPS, WALL, Scene, caption
from minisora_jax.toy.scenes import sample_scene
from minisora_jax.toy.transitions import sample_arrival, sample_transition
from minisora_jax.types import Clip

FROM_CLIPS = {"transitions": sample_transition, "arrivals": sample_arrival}  # with sizes of their own
SPLITS = ("train", "heldout", *FROM_CLIPS)


class Shapes:
    """Clips `offset`, `offset` + 1, ... of a split. With `size_THW` None, sizes are random."""

    def __init__(self, split: str, length: int, *, offset: int = 0, size_THW: tuple[int, int, int] | None = None):
        if split not in SPLITS:
            raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)}")
        if split in FROM_CLIPS and size_THW:
            raise ValueError(f"{split} have sizes of their own: size_THW={size_THW} must be None")
        self.split, self.length, self.offset, self.size_THW = split, length, offset, size_THW

    @classmethod
    def from_spec(cls, spec: str, count: int) -> Shapes:
        """The clips of "shapes[:SPLIT[:COUNT]]"; the defaults are train and `count`."""
        _, split, number, *_ = [*spec.split(":"), "", ""]
        if number and not number.isdigit():
            raise ValueError(f"{spec!r}: the count of clips must be a whole number, as in shapes:train:5000")
        return cls(split or "train", int(number or count))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> Clip:
        if not 0 <= i < self.length:
            raise IndexError(f"clip {i} is out of range for {self.length} clips")
        number = i + self.offset
        if self.split in FROM_CLIPS:
            scene = FROM_CLIPS[self.split](number)
        else:
            scene = sample_scene(number, self.split, self.size_THW)
        return Clip(render(scene), caption(scene), FPS, f"shapes/{self.split}/{number}")


# ---- Pixels


def render(scene: Scene) -> np.ndarray:
    """The frames of a scene: uint8 (T, H, W, 3), with edges anti-aliased by the distance to them."""
    T, H, W = scene.size_THW
    y, x = np.mgrid[0:H, 0:W] + 0.5
    frames = np.empty((T, H, W, 3), np.float32)
    if scene.background == "checkered":
        scroll = np.zeros(T) if scene.scroll_T is None else scene.scroll_T
        along = (x[0][None] - scroll[:, None]) * np.pi / CHECKER_CELL
        # The product of anti-aliased horizontal and vertical stripes is a checker with cells of +1 and -1.
        stripe = lambda a: np.clip(np.sin(a) * CHECKER_CELL / np.pi * 2, -1, 1)
        cells = stripe(along)[:, None, :] * stripe(y[:, 0] * np.pi / CHECKER_CELL)[None, :, None]
        dark, light = (np.array(c, np.float32) for c in CHECKER)
        frames[:] = dark + (0.5 + 0.5 * cells[..., None]) * (light - dark)
    else:
        frames[:] = BACKGROUNDS[scene.background]
    for thing in scene.objects:
        dx, dy = x[None] - thing.x_T[:, None, None], y[None] - thing.y_T[:, None, None]
        cover = np.clip(0.5 - distance(thing.shape, dx, dy, thing.radius_T[:, None, None]), 0.0, 1.0)[..., None]
        frames += cover.astype(np.float32) * (np.array(COLOURS[thing.colour], np.float32) - frames)
    if scene.wall:
        left, right = scene.wall
        cover = np.clip(np.minimum(x[0] - left, right - x[0]) + 0.5, 0.0, 1.0)[None, None, :, None]
        frames += cover.astype(np.float32) * (np.array(WALL, np.float32) - frames)
    return np.round(frames).astype(np.uint8)


def distance(shape: str, dx: np.ndarray, dy: np.ndarray, r: np.ndarray | float) -> np.ndarray:
    """The signed distance in pixels to the edge of a shape of radius r, negative inside; y points down."""
    if shape == "circle":
        return np.hypot(dx, dy) - r
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - 0.87 * r
    if shape == "triangle":
        corner = 1.15 * r
        sides = np.sqrt(0.75) * np.abs(dx) - 0.5 * dy
        return np.maximum(dy, sides) - 0.5 * corner
    bar = lambda a, b: np.maximum(np.abs(a) - r, np.abs(b) - 0.34 * r)
    return np.minimum(bar(dx, dy), bar(dy, dx))
