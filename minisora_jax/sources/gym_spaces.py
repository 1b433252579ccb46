"""Action spaces of gymnasium: actions as vectors, the names of their columns, and random actions.

    Discrete         one-hot                                       Dict, Tuple     their parts side by side
    MultiDiscrete    one-hots side by side                         Box             numbers, from finite bounds to -1..1,
    MultiBinary      0 or 1                                                        else as they are

Bounds beyond 1e6 count as none: VizDoom's turns by any angle have the limits of float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import EnumType
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

UNBOUNDED = 1e6


class ActionVectors:
    """Actions of an environment as float32 vectors (A,). `names` has the names of their columns.

    The environment names its actions by VizDoom's buttons, by `get_action_meanings()` (Atari), by an enum `actions`
    (MiniGrid) or by `action_names` (Crafter). Others are "action 0" and so on.

    Raises:
        ValueError: actions of its space are no vectors.
    """

    def __init__(self, env: gymnasium.Env):
        self.space = env.action_space
        self.names: tuple[str, ...] = ()
        for key, part, _ in parts_of(self.space):
            labels = _labels(env.unwrapped, part) or [f"{key or 'action'} {n}" for n in range(_count(part))]
            if isinstance(part, spaces.MultiDiscrete):
                labels = [f"{label} = {v}" for label, n in zip(labels, part.nvec.flat) for v in range(n)]
            self.names += tuple(labels)

    def encode(self, action: Any) -> np.ndarray:
        """The vector of an action of the space, float32 (A,)."""
        columns = [_encoded(part, np.asarray(value)) for _, part, value in parts_of(self.space, action)]
        return np.concatenate(columns).astype(np.float32)


def parts_of(space: spaces.Space, action: Any = None) -> Iterator[tuple[str, Any, Any]]:
    """(key, space, value in the action) of the simple spaces that a space consists of, in order.

    Raises:
        ValueError: actions of this space are no vectors.
    """
    if isinstance(space, spaces.Dict | spaces.Tuple):
        keyed = space.spaces.items() if isinstance(space, spaces.Dict) else enumerate(space.spaces)
        for key, part in keyed:
            for inner, simple, value in parts_of(part, None if action is None else action[key]):
                yield f"{key} {inner}".strip(), simple, value
    elif isinstance(space, spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary | spaces.Box):
        yield "", space, action
    else:
        raise ValueError(
            f"actions of the space {space} are no vectors: they are of Discrete, MultiDiscrete, MultiBinary, Box, and "
            "of Dict and Tuple of these"
        )


def sample(space: Any, rng: np.random.Generator) -> Any:
    """A random action, uniform within bounds, and normal where a Box has none. It depends on `rng` alone."""
    if isinstance(space, spaces.Dict):
        return {key: sample(part, rng) for key, part in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(sample(part, rng) for part in space.spaces)
    if isinstance(space, spaces.Discrete):
        return space.start + rng.integers(space.n)
    if isinstance(space, spaces.MultiDiscrete):
        return (space.start + rng.integers(space.nvec)).astype(space.dtype)
    if isinstance(space, spaces.MultiBinary):
        return rng.integers(0, 2, space.shape).astype(space.dtype)
    low, high = space.low.astype(float), space.high.astype(float)
    bounded = _bounded(space)
    drawn = np.clip(rng.normal(size=space.shape), low, high)
    drawn[bounded] = rng.uniform(low[bounded], high[bounded])
    return (np.rint(drawn) if np.issubdtype(space.dtype, np.integer) else drawn).astype(space.dtype)


def _encoded(part: Any, value: np.ndarray) -> np.ndarray:
    if isinstance(part, spaces.Discrete):
        return np.eye(int(part.n))[int(value) - int(part.start)]
    if isinstance(part, spaces.MultiDiscrete):
        places = (value - part.start).flat
        return np.concatenate([np.eye(int(n))[int(v)] for n, v in zip(part.nvec.flat, places)])
    value = value.astype(float).reshape(-1)
    if isinstance(part, spaces.Box):
        bounded, low, high = (x.reshape(-1) for x in (_bounded(part), part.low.astype(float), part.high.astype(float)))
        span = np.where(bounded & (high > low), high - low, 1.0)
        return np.where(bounded, 2 * (value - low) / span - (high > low), value)
    return value


def _bounded(box: spaces.Box) -> np.ndarray:
    return (np.abs(box.low) < UNBOUNDED) & (np.abs(box.high) < UNBOUNDED)


def _count(part: Any) -> int:
    return int(part.n) if isinstance(part, spaces.Discrete) else int(np.prod(part.shape, dtype=int))


def _labels(game: Any, part: Any) -> list[str]:
    """The environment's names of a Discrete space's actions, or of the components of another one; [] for none."""
    labels: list[str] = []
    if hasattr(game, "game") and hasattr(game, "num_binary_buttons"):  # VizDoom: numbers come before buttons
        names = [_plain(button.name) for button in game.game.get_available_buttons()]
        numbers, buttons = names[: game.num_delta_buttons], names[game.num_delta_buttons :]
        if isinstance(part, spaces.Discrete):
            pressed = ([name for name, on in zip(buttons, combination) if on] for combination in game.button_map)
            labels = [" and ".join(names) or "nothing" for names in pressed]
        else:
            labels = numbers if isinstance(part, spaces.Box) else buttons
    elif hasattr(game, "get_action_meanings"):
        labels = [_plain(name) for name in game.get_action_meanings()]
    elif isinstance(kinds := getattr(game, "actions", None), EnumType):
        labels = [_plain(name) for name in kinds.__members__]
    elif isinstance(names := getattr(game, "action_names", None), list | tuple):
        labels = [_plain(str(name)) for name in names]
    return labels if len(labels) == _count(part) and len(set(labels)) == len(labels) else []


def _plain(name: str) -> str:
    return name.lower().replace("_", " ")
