"""Draw the scenes of the procedural clips at random: objects, their sizes, and their paths."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from minisora_jax.toy.grammar import BACKGROUNDS, COLOURS, DIRECTIONS, RADIUS, SHAPES, SIDES, Object, Scene, held_out


def sample_scene(index: int, split: str = "train", size_THW: tuple[int, int, int] | None = None) -> Scene:
    """Scene `index` of a split, the same on every machine."""
    rng = np.random.default_rng([{"train": 0, "heldout": 1}[split], index])
    while True:
        scene = _draw_scene(rng, size_THW)
        kept_from_training = any(held_out(o.triple) for o in scene.objects)
        if kept_from_training == (split == "heldout"):
            return scene


def _draw_scene(rng: np.random.Generator, size_THW: tuple[int, int, int] | None) -> Scene:
    pick = functools.partial(choose, rng)
    kind = pick(["image", "two", "two", "hide", "pan"] + ["one"] * 10)
    T, H, W = size_THW or (pick((5, 9, 13, 17)), pick(SIDES), pick(SIDES))
    if max(H, W) > 2 * min(H, W):
        raise ValueError(f"height={H}, width={W}: the aspect must be between 1:2 and 2:1")
    if T == 1 or (kind == "image" and not size_THW):
        T, kind = 1, "image"
    colour, shape, background = pick(list(COLOURS)), pick(SHAPES), pick([*BACKGROUNDS, "checkered"])
    size = pick(("small", "large"))
    if kind == "image":
        thing = Object(colour, shape, "still", size)
        return Scene((1, H, W), (_place(rng, thing, 1, (0, 0, W, H), min(H, W)),), background)
    if kind == "two":
        return _two_objects(rng, pick, (T, H, W), background)
    if kind == "hide":
        return _behind_a_wall(rng, pick, (T if size_THW else 17, H, max(W, 48)), colour, shape, background)
    if kind == "pan":
        T = T if size_THW else pick((9, 13, 17))  # the texture moves slowly enough to follow
        motion = pick(("pan-left", "pan-right"))
        world = "right" if motion == "pan-left" else "left"  # the scene moves against the camera
        thing = _place(rng, Object(colour, shape, world, size, pick(("slowly", "quickly"))), T, (0, 0, W, H), min(H, W))
        thing = dataclasses.replace(thing, motion=motion, speed="")
        return Scene((T, H, W), (thing,), "checkered", scroll_T=thing.x_T - thing.x_T[0])
    motion = pick(("bounce", "bounce", "orbit", "orbit", "grow", "shrink", "grow", "shrink", "still", *DIRECTIONS))
    if motion in ("bounce", "orbit") and not size_THW:
        T = pick((13, 17))  # enough frames for a whole turn
    speed = pick(("slowly", "quickly")) if motion in DIRECTIONS else ""
    thing = Object(colour, shape, motion, "" if motion in ("grow", "shrink") else size, speed)
    return Scene((T, H, W), (_place(rng, thing, T, (0, 0, W, H), min(H, W)),), background)


def choose(rng: np.random.Generator, options: Sequence[Any]) -> Any:
    """One of the options, all equally likely."""
    return options[int(rng.integers(len(options)))]


def place_again(rng: np.random.Generator, scene: Scene) -> Scene:
    """A scene with the same caption, whose objects take other paths. It has no wall and no pan."""
    T, H, W = scene.size_THW
    if len(scene.objects) == 1:
        objects = [_place(rng, scene.objects[0], T, (0, 0, W, H), min(H, W))]
    else:
        objects = [_place(rng, o, T, lane, _lane_side(lane)) for o, lane in zip(scene.objects, _lanes(H, W))]
    return dataclasses.replace(scene, objects=tuple(objects))


def _lanes(H: int, W: int) -> list[tuple[int, int, int, int]]:
    """The halves of a frame, for two objects that never meet."""
    return [(0, 0, W, H // 2), (0, H // 2, W, H)] if H >= W else [(0, 0, W // 2, H), (W // 2, 0, W, H)]


def _lane_side(lane: tuple[int, int, int, int]) -> float:
    return 0.95 * min(lane[2] - lane[0], lane[3] - lane[1])


def _two_objects(rng, pick, size_THW, background) -> Scene:
    """Two objects of different colours, each in its own half of the frame, so that they never meet."""
    T, H, W = size_THW
    H, W = (max(H, 48), W) if H >= W else (H, max(W, 48))
    colours = rng.permutation(list(COLOURS))[:2]
    objects = []
    for lane, colour in zip(_lanes(H, W), colours):
        motion = pick(("still", "grow", "shrink", "left", "right", "up", "down"))
        thing = Object(str(colour), pick(SHAPES), motion)
        objects.append(_place(rng, thing, T, lane, _lane_side(lane)))
    return Scene((T, H, W), tuple(objects), background)


def _behind_a_wall(rng, pick, size_THW, colour, shape, background) -> Scene:
    """A small object that crosses the frame. A wall near the middle hides it for about three frames."""
    T, H, W = size_THW
    direction = pick(("left", "right"))
    thing = Object(colour, shape, direction, "small", "quickly")
    thing = _place(rng, thing, T, (0, 0, W, H), min(H, W, 34), share=1.0)
    thing = dataclasses.replace(thing, motion=f"hide-{direction}", speed="")
    step = abs(thing.x_T[-1] - thing.x_T[0]) / (T - 1)
    half = thing.radius_T[0] * 1.1 + 1.5 * step
    middle = W / 2 + rng.uniform(-0.05, 0.05) * W
    return Scene((T, H, W), (thing,), background, wall=(middle - half, middle + half))


def _place(rng, thing: Object, T: int, box: tuple[int, int, int, int], side: float, share=None) -> Object:
    """`thing` with a path of T frames inside `box` (left, top, right, bottom). Its radius is relative to `side`."""
    time = np.linspace(0.0, 1.0, T) if T > 1 else np.zeros(1)
    radius = np.full(T, RADIUS[thing.size] * side)
    if thing.motion in ("grow", "shrink"):
        low, high = 0.15 * side, rng.uniform(0.28, 0.34) * side
        radius = low + (high - low) * (time if thing.motion == "grow" else 1.0 - time)
    reach = radius.max() + 1.0  # it stays a pixel away from the edge
    low = np.array([box[0] + reach, box[1] + reach])
    free = np.array([box[2] - reach, box[3] - reach]) - low
    start, move = low + rng.uniform(size=2) * free, np.zeros((T, 2))
    if thing.motion in DIRECTIONS:
        way = np.array(DIRECTIONS[thing.motion], float)
        share = share or (rng.uniform(0.85, 1.0) if thing.speed != "slowly" else rng.uniform(0.45, 0.6))
        length = share * min(f for f, w in zip(free, way) if w)
        slack = free - length * np.abs(way)
        start = low + rng.uniform(size=2) * slack + length * np.maximum(-way, 0.0)
        move = time[:, None] * way * length
    elif thing.motion == "bounce":
        # Along one axis it reflects after at least a third of its way, and comes back at least half of the way.
        axis = int(rng.integers(2)) if min(free) * 1.5 > max(free) else int(np.argmax(free))
        travel = np.zeros(2)
        travel[axis] = rng.uniform(1.3, 1.7) * free[axis]
        travel[1 - axis] = rng.uniform(0.0, 0.5) * free[1 - axis]
        begin = np.array([rng.uniform(0.0, 0.4) if a == axis else rng.uniform(0.0, 0.5) for a in (0, 1)]) * free
        path = begin + time[:, None] * travel
        path = free - np.abs(free - path % (2 * free))
        path = np.where(rng.uniform(size=2) < 0.5, free - path, path)
        start, move = low, path
    elif thing.motion == "orbit":
        ring = 0.5 * min(free) * rng.uniform(0.85, 1.0)
        turn = 2 * np.pi * (rng.uniform() + rng.choice([-1.0, 1.0]) * rng.uniform(0.85, 1.05) * time)
        slack = free - 2 * ring
        start = low + ring + rng.uniform(size=2) * slack
        move = ring * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    path = start + move
    return dataclasses.replace(thing, x_T=path[:, 0], y_T=path[:, 1], radius_T=radius)
