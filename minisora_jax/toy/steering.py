"""A shape that is steered: the procedural world as an environment of gymnasium, and a reader of what was commanded.

    minisora prepare 'gym:minisora_jax.toy.steering:Steer-v0?policy=random&episodes=2000&frames=17' data/steer

The player's shape goes in 8 directions, jumps, pushes a second shape, and takes or drops it. In half of the episodes a
wall hides what goes behind it. `moves_shown` reads the moves off pictures, so a made world is checked without an
environment beside it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import gymnasium
import numpy as np

from minisora_jax.toy import grammar
from minisora_jax.toy.checker import observe
from minisora_jax.toy.grammar import BACKGROUNDS, COLOURS, SHAPES, Object, Scene
from minisora_jax.toy.scenes import choose
from minisora_jax.toy.shapes import render

SIDE, RADIUS, SPEED = 48, 6.0, 3.0  # pixels; of the frame, a shape, and a step
JUMP = (0.0, 6.0, 9.0, 9.0, 6.0)  # pixels above the ground at each step of a jump
WALL = 14.0  # its width
MOVES = {
    "stay": (0, 0),
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "up left": (-1, -1),
    "up right": (1, -1),
    "down left": (-1, 1),
    "down right": (1, 1),
}
ACTIONS = (*MOVES, "jump", "take")
STEPS = 65  # frames of an episode


class Steer(gymnasium.Env):
    """The environment. Its `action_names` are ACTIONS."""

    metadata: Any = {"render_modes": ["rgb_array"], "render_fps": 8}  # noqa: RUF012
    action_space = gymnasium.spaces.Discrete(len(ACTIONS))
    observation_space = gymnasium.spaces.Box(0, 255, (SIDE, SIDE, 3), np.uint8)
    action_names = ACTIONS

    def __init__(self, render_mode: str | None = None):
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Two shapes of different colours at random places, in half of the episodes with a wall."""
        super().reset(seed=seed)
        rng = self.np_random
        colours = rng.choice(list(COLOURS), 2, replace=False)
        self._looks = [(str(colour), choose(rng, SHAPES)) for colour in colours]
        self._background = choose(rng, list(BACKGROUNDS))
        self._wall = None if rng.random() < 0.5 else float(rng.uniform(RADIUS, SIDE - WALL - RADIUS))
        self._at, self._thing = (rng.uniform(RADIUS, SIDE - RADIUS, 2) for _ in range(2))
        if np.hypot(*(self._thing - self._at)) < 2 * RADIUS:
            self._thing = inside(self._at + 2.5 * RADIUS * np.sign(SIDE / 2 - self._at))
        self._carried, self._air, self._steps = False, 0, 0
        return self.render(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        """One of ACTIONS."""
        name = ACTIONS[int(action)]
        before, self._steps = self._at, self._steps + 1
        self._air = self._air - 1 if self._air else len(JUMP) - 1 if name == "jump" else 0
        near = np.hypot(*(self._thing - self._at)) < 2 * RADIUS + SPEED
        if name == "take" and (self._carried or near):
            self._carried = not self._carried
        self._at = moved(self._at, name)
        if self._carried:
            self._thing = inside(self._thing + self._at - before)
        elif not self._air:
            self._push(before)
        return self.render(), 0.0, False, self._steps >= STEPS - 1, {}

    def _push(self, before: np.ndarray) -> None:
        """Move the second shape out of the player's way; where it cannot go, the player stays."""
        apart = self._thing - self._at
        if (distance := np.hypot(*apart)) >= 2 * RADIUS - 0.5 or not np.any(self._at != before):
            return
        away = apart / distance if distance else np.array([1.0, 0.0])
        self._thing = inside(self._at + 2 * RADIUS * away)
        if np.hypot(*(self._thing - self._at)) < 2 * RADIUS - 1:
            self._at = before

    def render(self) -> Any:
        """The picture, uint8 (SIDE, SIDE, 3)."""
        height = JUMP[len(JUMP) - self._air] if self._air else 0.0
        of = lambda look, at: dict(zip(("colour", "shape"), look)) | {"x_T": at[:1], "y_T": at[1:]}
        places = [of(self._looks[1], self._thing), of(self._looks[0], self._at - [0.0, height])]
        things = tuple(Object(motion="still", radius_T=np.array([RADIUS]), **place) for place in places)
        wall = None if self._wall is None else (self._wall, self._wall + WALL)
        return render(Scene((1, SIDE, SIDE), things, self._background, wall))[0]


gymnasium.register("Steer-v0", "minisora_jax.toy.steering:Steer")


def moved(at: np.ndarray, name: str) -> np.ndarray:
    """The place after an action, in a frame without obstacles."""
    way = np.array(MOVES.get(name, (0, 0)), float)
    return inside(at + SPEED * way / max(np.hypot(*way), 1.0))


def inside(at: np.ndarray) -> np.ndarray:
    """The nearest place that keeps a shape within the frame."""
    return np.clip(at, RADIUS, SIDE - RADIUS)


@dataclasses.dataclass(frozen=True)
class Shown:
    """What pictures show of the commanded moves."""

    right: int  # steps whose move is the commanded one
    steps: int  # steps at which nothing is in the player's way and nothing hides it


def moves_shown(frames_THWC: np.ndarray, actions: list[str], colour: str) -> Shown:
    """Whether the shape of a colour moves as commanded from each frame to the next, as far as that can be told.

    Left out are steps within a jump, beside another shape or the wall, and where the wall may hide the
    player. A move is right if it is nearer to the commanded one than to every other of MOVES.

    Args:
        frames_THWC: Pictures of `Steer`'s size.
        actions: The action that led to each frame but the first (T - 1).
        colour: The player's.
    """
    is_wall = np.linalg.norm(frames_THWC.astype(np.float32) - grammar.WALL, axis=-1) < 40
    wall_W = np.flatnonzero(is_wall.mean((0, 1)) > 0.5) + 0.5
    in_part = lambda at: len(wall_W) > 0 and np.abs(wall_W - at[0]).min() < RADIUS + 2
    seen = {each.colour: each for each in observe(frames_THWC, 2)}
    if colour not in seen:
        return Shown(0, 0 if len(wall_W) else len(actions))
    player, others = seen[colour], [each for name, each in seen.items() if name != colour]
    right = steps = 0
    for t, name in enumerate(actions, start=1):
        jumped = "jump" in actions[max(0, t - len(JUMP)) : t]
        visible = bool(player.visible_T[t - 1] and player.visible_T[t])
        near = any(np.hypot(*(each.path_T2[t - 1] - player.path_T2[t - 1])) < 3 * RADIUS for each in others)
        at, then = player.path_T2[t - 1], player.path_T2[t]
        if jumped or near or in_part(at) or in_part(then) or (len(wall_W) and not visible):
            continue
        if not visible:  # and nothing hides it
            steps += 1
            continue
        misses = {other: np.hypot(*(moved(at, other) - then)) for other in MOVES}
        wanted = misses.get(name, misses["stay"])
        right, steps = right + (wanted <= min(misses.values()) + 0.35), steps + 1
    return Shown(right, steps)
