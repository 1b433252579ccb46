"""Play an environment of gymnasium: its pictures, who chooses the actions, and one episode from beginning to end."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from minisora_jax.config import how_to_install
from minisora_jax.io.user_function import UserFunctionError, load_function
from minisora_jax.media.video import VideoError

PACKAGES = {"Vizdoom": "vizdoom.gymnasium_wrapper", "ALE/": "ale_py"}  # start of a name -> what registers it
HOLD = 0.9  # the probability that `Sticky` repeats an action
STUCK = 0.7  # of the episode's mean change of the picture; below it `Sticky` takes another action
PATIENCE, ESCAPE = 2, 8  # frames of an action before it can be stuck, and of the one that it takes then
FORWARD = 2  # how much likelier than another one `Sticky` goes forward

STICKY = (HOLD, STUCK, PATIENCE, ESCAPE, FORWARD)


class Game:
    """An environment that shows its pictures.

    Args:
        name: as `gymnasium.make` takes it, such as "CartPole-v1" or "my_module:Maze-v0".
        frame_skip: steps of the environment a frame; None: as the environment is registered.

    Raises:
        ImportError: a package is missing.
        ValueError: there is no such environment, or it shows no pictures.
    """

    def __init__(self, name: str, frame_skip: int | None = None):
        gymnasium = _import("gymnasium", name)
        module, _, name = name.rpartition(":")
        for needed in [module, *(module for start, module in PACKAGES.items() if name.startswith(start))]:
            if needed:
                _import(needed, name)
        try:
            spec = gymnasium.spec(name)
            kind = (
                spec.entry_point
                if callable(spec.entry_point)
                else gymnasium.envs.registration.load_env_creator(spec.entry_point)
            )
        except ModuleNotFoundError as error:
            raise ImportError(f"{name} needs a package: {error}; {how_to_install('worlds')} has some") from error
        except gymnasium.error.Error as error:
            raise ValueError(f"gymnasium has no environment {name}: {error}") from error
        kwargs: dict[str, Any] = {}
        if "rgb_array" in getattr(kind, "metadata", {}).get("render_modes", ()):
            kwargs["render_mode"] = "rgb_array"
        own = "frame_skip" in spec.kwargs or name.startswith("Vizdoom")  # the environment repeats actions itself
        if own and frame_skip:
            kwargs["frame_skip"] = frame_skip
        try:
            self.env = gymnasium.make(name, disable_env_checker=True, **kwargs)
        except gymnasium.error.Error as error:
            raise ValueError(f"{name} does not start: {error}") from error
        self.folder = tempfile.TemporaryDirectory(prefix="minisora-game-")
        if name.startswith("Vizdoom"):  # else it writes _vizdoom.ini where it runs
            self.env.unwrapped.game.set_doom_config_path(f"{self.folder.name}/vizdoom.ini")
        self.name, self.rendered = name, "render_mode" in kwargs
        self.repeats = 1 if own else frame_skip or 1
        skipped = (frame_skip or spec.kwargs.get("frame_skip", 1)) if own else self.repeats
        rate = self.env.metadata.get("render_fps")
        self.fps = rate / skipped if rate else None  # frames per second; None: it states none

    def reset(self, seed: int) -> Any:
        """The first observation of an episode."""
        return self.env.reset(seed=seed)[0]

    def step(self, action: Any) -> tuple[Any, bool]:
        """(observation, whether the episode has ended) after one frame of an action."""
        observation, over = None, False
        for _ in range(self.repeats):
            observation, _, terminated, truncated, _ = self.env.step(action)
            if over := bool(terminated or truncated):
                break
        return observation, over

    def picture(self, observation: Any) -> np.ndarray:
        """What the environment shows, uint8 (H, W, 3): the observation's "screen", what it renders, or its one image.

        Raises:
            VideoError: it shows nothing of the kind.
        """
        parts = observation if isinstance(observation, dict) else {"": observation}
        if "screen" in parts:
            return _rgb(parts["screen"], self.name)
        if self.rendered:
            return _rgb(self.env.render(), self.name)
        images = [x for x in parts.values() if isinstance(x, np.ndarray) and x.ndim == 3 and x.dtype == np.uint8]
        if len(images) != 1:
            raise VideoError(
                "no picture", f"{self.name} renders no rgb_array, and its observation has {len(images)} images"
            )
        return _rgb(images[0], self.name)

    def close(self) -> None:
        """End the environment."""
        self.env.close()
        self.folder.cleanup()


# ---- Who plays


Policy = Callable[[Any, np.ndarray], Any]  # (observation, picture) -> action


def open_policy(name: str, game: Game, labels: tuple[str, ...], rng: np.random.Generator) -> Policy:
    """The policy "random", "sticky" or FILE.py:FUNCTION for one episode."""
    from minisora_jax.sources.gym_spaces import sample

    space = game.env.action_space
    if name == "random":
        return lambda observation, picture: sample(space, rng)
    if name == "sticky":
        return Sticky(space, labels, rng)
    function = load_function(name)

    def chosen(observation: Any, picture: np.ndarray) -> Any:
        try:
            action = function(observation, space, rng)
        except Exception as error:
            raise UserFunctionError(f"{name} raised {type(error).__name__}: {error}") from error
        if not space.contains(action):
            raise UserFunctionError(f"{name} gave {action!r:.100}, which is no action of {space}")
        return action

    return chosen


class Sticky:
    """Repeats an action with probability 0.9, so that a frame's actions last and an agent gets somewhere.

    Two rules make it walk. If after more than 2 frames of an action the picture changes by less than 0.7 of its mean
    change in this episode, it takes another one, for more than 8 frames: it turns away from walls. And an action with
    "forward" in its name is drawn twice as often as another one.
    """

    def __init__(self, space: Any, labels: tuple[str, ...], rng: np.random.Generator):
        self.space, self.rng = space, rng
        self.weights = np.array([FORWARD if "forward" in label else 1.0 for label in labels])
        self.action, self.last, self.changes = None, None, []
        self.held, self.keep = 0, 0  # frames of the action so far, and that it is kept at least

    def __call__(self, observation: Any, picture: np.ndarray) -> Any:
        stuck, self.held = False, self.held + 1
        if self.last is not None:
            change = float(np.abs(picture.astype(np.int16) - self.last).mean())
            self.changes.append(change)
            stuck = self.held > PATIENCE and change < STUCK * np.mean(self.changes)
        self.last = picture.astype(np.int16)
        if self.action is None or stuck or (self.held > self.keep and self.rng.random() >= HOLD):
            self.action = self._another(self.action if stuck else None)
            self.held, self.keep = 0, ESCAPE if stuck else 0
        return self.action

    def _another(self, useless: Any) -> Any:
        """A random action; not `useless` where there are few."""
        from gymnasium.spaces import Discrete

        from minisora_jax.sources.gym_spaces import sample

        if not isinstance(self.space, Discrete):
            return sample(self.space, self.rng)
        weights = self.weights.copy()
        if useless is not None and len(weights) > 1:
            weights[int(useless) - int(self.space.start)] = 0
        return self.space.start + self.rng.choice(len(weights), p=weights / weights.sum())


# ---- An episode


def play(
    game: Game,
    policy: str,
    seeds: tuple[int, int],
    steps: int,
    size_HW: tuple[int, int] | None,
    alive: Callable[[], None],
) -> tuple[np.ndarray, np.ndarray]:
    """The frames, uint8 (T, H, W, 3), and the actions, float32 (T, A), of an episode.

    Args:
        policy: see `open_policy`.
        seeds: of the environment, below 2**31, and of the policy.
        steps: the most frames.
        size_HW: the frames' height and width; None: as they are drawn.
        alive: called at each frame.
    """
    from minisora_jax.sources.gym_spaces import ActionVectors

    vectors = ActionVectors(game.env)
    game.env.action_space.seed(seeds[1])
    policy_of = open_policy(policy, game, vectors.names, np.random.default_rng(seeds[1]))
    observation = game.reset(seeds[0])
    picture = game.picture(observation)
    frames, actions = [_resized(picture, size_HW)], [np.zeros(len(vectors.names), np.float32)]
    while len(frames) < steps:
        alive()
        action = policy_of(observation, picture)
        vector = vectors.encode(action)
        observation, over = game.step(action)
        if over:
            break
        picture = game.picture(observation)
        frames.append(_resized(picture, size_HW))
        actions.append(vector)
    return np.stack(frames), np.stack(actions)


def _resized(picture_HWC: np.ndarray, size_HW: tuple[int, int] | None) -> np.ndarray:
    if size_HW is None or picture_HWC.shape[:2] == size_HW:
        return picture_HWC.copy()
    image = Image.fromarray(np.ascontiguousarray(picture_HWC))
    return np.asarray(image.resize((size_HW[1], size_HW[0]), Image.Resampling.BOX))


def _rgb(picture: Any, name: str) -> np.ndarray:
    """The picture as uint8 (H, W, 3); grey becomes RGB."""
    picture = np.asarray(picture)
    if picture.ndim == 2:
        picture = picture[..., None]
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] not in (1, 3):
        raise VideoError("no picture", f"{name} shows {picture.dtype} {picture.shape}, and should show uint8 (H, W, 3)")
    return np.repeat(picture, 3, axis=2) if picture.shape[2] == 1 else picture


def _import(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"{name} needs {package}: {how_to_install('worlds')}, minisora[worlds] ({error})") from error
