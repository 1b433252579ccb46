"""Episodes of a gymnasium environment as clips with actions (`uv sync --extra worlds`).

    gym:VizdoomHealthGathering-v1?frame_skip=4&size=64x80&episodes=200&frames=65&seed=0
    gym:ALE/Breakout-v5?policy=random            gym:CartPole-v1?policy=play.py:balance
    gym:my_package.worlds:Maze-v0                imports my_package.worlds, which registers the environment

An item of the source is an episode, which is played when its frames are needed. `prepare` cuts it into clips of
`frames` frames. Episode i depends on (seed, i) alone, so any worker plays the same one. The frame after the last action
is not used: several environments, VizDoom among them, draw none there.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from minisora_jax.io.user_function import load_function
from minisora_jax.sources.base import Media
from minisora_jax.sources.gym_play import PACKAGES, STICKY, Game, play
from minisora_jax.sources.skips import SkipReport

LIMITS = {  # option -> its least and its largest number
    "frame_skip": (1, 1000),
    "episodes": (1, 10**9),
    "frames": (1, 100_000),
    "steps": (9, 10**6),
    "seed": (0, 2**63 - 1),
}
SIDES = (8, 8192)  # pixels


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of a gym source.

    Args:
        policy: who plays: "random", "sticky" (`gym_play.Sticky`), or FILE.py:FUNCTION, a function
            (observation, action_space, rng) -> action.
        frame_skip: steps of the environment a frame, all with one action; None: as the environment is registered.
        size: (height, width) in pixels, to which frames are resized with a box filter; None: as they are drawn.
        episodes: how many.
        frames: frames of a clip, 1 + 4k; the last clip of an episode may have 9 or more.
        steps: the most frames of an episode.
        seed: of the episodes.
        fps: frames per second; None: as the environment states it.
        caption: of all clips; {environment} in it becomes the environment's name in words.

    Raises:
        ValueError: an option is out of its range.
    """

    policy: str = "sticky"
    frame_skip: int | None = None
    size: tuple[int, int] | None = None
    episodes: int = 100
    frames: int = 65
    steps: int = 1000
    seed: int = 0
    fps: float | None = None
    caption: str = "a game of {environment}"

    def __post_init__(self):
        for name, (least, most) in LIMITS.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ValueError(f"{name}={value} must be {least} to {most}")
        if self.frames % 4 != 1:
            low = 1 + (self.frames - 1) // 4 * 4
            raise ValueError(f"frames={self.frames} must be 1 + 4*k; use {low} or {low + 4}")
        if self.size and not all(SIDES[0] <= side <= SIDES[1] for side in self.size):
            raise ValueError(f"size={self.size[0]}x{self.size[1]} must be {SIDES[0]} to {SIDES[1]} pixels each way")
        if self.fps is not None and not 0 < self.fps <= 1000:
            raise ValueError(f"fps={self.fps:g} must be above 0 and at most 1000")
        if not self.caption.strip():
            raise ValueError("caption= is empty: leave it out for 'a game of ...'")
        if self.policy not in ("random", "sticky"):
            if ":" not in self.policy:
                raise ValueError(f"policy={self.policy} must be random, sticky or FILE.py:FUNCTION")
            load_function(self.policy)


class Gym:
    """Episodes of an environment. It pickles into few bytes, and each episode has an environment of its own.

    Args:
        name: the environment as `gymnasium.make` takes it.

    Raises:
        ImportError: a package is missing.
        ValueError: there is no such environment, or it does not state what is needed.
    """

    def __init__(self, name: str, options: Options):
        self.name, self.options, self.report = name, options, SkipReport()
        game = Game(name, options.frame_skip)
        try:
            from minisora_jax.sources.gym_spaces import ActionVectors  # needs gymnasium

            self.actions = ActionVectors(game.env).names
        finally:
            game.close()
        if not (rate := options.fps or game.fps):
            raise ValueError(f"{name} states no frames per second (render_fps): add '&fps=15', for example")
        self.fps = rate
        self.caption = options.caption.replace("{environment}", in_words(name))
        self.identity = f"gym:{hashlib.sha256(json.dumps(_facts(name, options)).encode('utf-8')).hexdigest()}"

    def __len__(self) -> int:
        return self.options.episodes

    def __getitem__(self, i: int) -> Media:
        if not 0 <= i < len(self):
            raise IndexError(f"episode {i} of {len(self)}")
        name = f"{self.name.rpartition(':')[2]}/seed-{self.options.seed}/episode-{i:05d}"
        return Media(name, self.caption, functools.partial(self._play, i), self.fps, window=self.options.frames)

    def _play(self, i: int, alive: Callable[[], None]) -> tuple[np.ndarray, np.ndarray]:
        """The frames and the actions of episode i."""
        options = self.options
        world, player = np.random.SeedSequence([options.seed, i]).generate_state(2) >> 1  # below 2**31
        game = Game(self.name, options.frame_skip)
        try:
            return play(game, options.policy, (int(world), int(player)), options.steps, options.size, alive)
        finally:
            game.close()


def open_gym(spec: str) -> Gym:
    """The source of gym:ENVIRONMENT?option=value&...; `Options` lists the options.

    Raises:
        ImportError: a package is missing.
        ValueError: there is no such environment or option, or a value is none of its kind.
    """
    name, _, query = spec.removeprefix("gym:").partition("?")
    if not name:
        raise ValueError(f"{spec!r} must look like gym:ENVIRONMENT?policy=sticky, as gym:VizdoomHealthGathering-v1")
    pairs = parse_qsl(query, keep_blank_values=True)
    values, known = dict(pairs), [field.name for field in dataclasses.fields(Options)]
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"{spec}: {', '.join(unknown)} is no option of a gym source; those are {', '.join(known)}")
    if len(values) < len(pairs):
        raise ValueError(f"{spec}: an option comes twice")
    return Gym(name, Options(**{key: _value(key, text) for key, text in values.items()}))


def in_words(name: str) -> str:
    """The name of an environment as a reader says it: "VizdoomHealthGathering-v1" is "doom: health gathering"."""
    base = re.sub(r"-v\d+$", "", re.split(r"[:/]", name)[-1])
    base = base.removesuffix("-MultiBinary")
    kind, base = ("doom: ", base.removeprefix("Vizdoom")) if base.startswith("Vizdoom") else ("", base)
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])|[-_]+", " ", base)
    return kind + words.lower().strip()


def _value(key: str, text: str) -> Any:
    """The value of an option."""
    if key == "size":
        if not (match := re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)):
            raise ValueError(f"size={text} must be HEIGHTxWIDTH in pixels, as size=64x80")
        return int(match[1]), int(match[2])
    kind = int if key in LIMITS else float if key == "fps" else str
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{key}={text} must be a {'whole ' if kind is int else ''}number") from None


def _facts(name: str, options: Options) -> list:
    """What decides the clips' bytes: the options, the user's file, and the versions of the packages."""
    file = Path(options.policy.rpartition(":")[0])
    policy = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
    registering = [module for start, module in PACKAGES.items() if name.startswith(start)] or name.split(":")[:-1]
    packages = ["gymnasium", *(module.partition(".")[0] for module in registering)]
    return [name, dataclasses.asdict(options), policy, STICKY, [[package, _version(package)] for package in packages]]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
