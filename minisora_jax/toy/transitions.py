"""Draw the scenes that teach transitions: the end of one clip, the way to the beginning of another, and that beginning.

Both clips have one caption. Half of the time the second clip is the first one again, so that the way closes a loop. On
the way an object goes straight from its last place to its next one, and grows or shrinks evenly.

An arrival is the end of a clip whose objects then stay where they have arrived. Without it a model of transitions knows
of one thing alone that may follow an end: the way back. So it would turn objects round in each long video.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import numpy as np

from minisora_jax.toy.grammar import DIRECTIONS, MOTIONS, Object, Scene
from minisora_jax.toy.scenes import choose, place_again, sample_scene

FRAMES = 21  # frames of a whole transition
BEFORE = (1, 5, 5, 5, 9)  # frames of the first clip: 1 + 4k, as the codec groups them
BETWEEN = (8, 12)  # steps from the last frame of the first clip to the first frame of the second
ENDING = (*DIRECTIONS, "still", "grow", "shrink", "pan-left", "pan-right")  # motions that come to an end
LEAST = FRAMES + 1 - min(BEFORE) - min(BETWEEN)  # frames that a clip must have


def sample_transition(index: int) -> Scene:
    """Scene `index` of the transitions, the same on every machine."""
    rng = np.random.default_rng([2, index])
    first = _scene(index)
    loop = first.scroll_T is not None or rng.random() < 0.5  # two pans start at other places of the texture
    second = first if loop else place_again(rng, first)
    before, steps = choose(rng, BEFORE), choose(rng, BETWEEN)
    after = FRAMES - steps + 1 - before
    objects = tuple(_joined(a, b, before, steps, after) for a, b in zip(first.objects, second.objects))
    scroll_T = objects[0].x_T - objects[0].x_T[0] if first.scroll_T is not None else None
    return dataclasses.replace(first, size_THW=(FRAMES, *first.size_THW[1:]), objects=objects, scroll_T=scroll_T)


def sample_arrival(index: int) -> Scene:
    """Scene `index` of the arrivals, the same on every machine."""
    rng = np.random.default_rng([3, index])
    scene = _scene(index, ENDING)
    before = choose(rng, BEFORE)
    held = lambda path_T: np.concatenate([path_T[-before:], np.repeat(path_T[-1:], FRAMES - before)])
    paths = ({name: held(getattr(a, name)) for name in ("x_T", "y_T", "radius_T")} for a in scene.objects)
    objects = tuple(dataclasses.replace(a, **path) for a, path in zip(scene.objects, paths))
    scroll_T = held(scene.scroll_T) if scene.scroll_T is not None else None
    return dataclasses.replace(scene, size_THW=(FRAMES, *scene.size_THW[1:]), objects=objects, scroll_T=scroll_T)


def _scene(index: int, motions: Collection[str] = MOTIONS) -> Scene:
    """A training scene of at least LEAST frames whose objects move in one of these ways and are never hidden."""
    suits = lambda s: s.wall is None and s.size_THW[0] >= LEAST and all(o.motion in motions for o in s.objects)
    while not suits(scene := sample_scene(index, "train")):
        index += 10**7
    return scene


def _joined(a: Object, b: Object, before: int, steps: int, after: int) -> Object:
    """The last `before` frames of object a, the way of `steps` steps, and the first `after` frames of object b."""
    path = {}
    for name in ("x_T", "y_T", "radius_T"):
        past, future = getattr(a, name)[-before:], getattr(b, name)[:after]
        path[name] = np.concatenate([past, np.linspace(past[-1], future[0], steps + 1)[1:-1], future])
    return dataclasses.replace(a, **path)
