"""Worlds to walk in: pictures that follow from actions, from a model of streamed frames and its codec.

    World.load(model, codec)  ->  world.player(seed)  ->  player.step("move forward")  ->  uint8 (H, W, 3)

Players of one world share its weights. Each has a stream of its own (streaming.py), so their cost adds up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minisora_jax.bundled import CODEC
from minisora_jax.data.actions import action_width, by_latent_frame
from minisora_jax.data.rows import padded_text
from minisora_jax.diffusion.objective import ObjectiveConfig
from minisora_jax.diffusion.time import TimeConfig
from minisora_jax.generate.loading import load_parts
from minisora_jax.generate.streaming import Stream, StreamConfig
from minisora_jax.io.model_dir import load_config
from minisora_jax.models.captions import Captions
from minisora_jax.models.codec import Codec
from minisora_jax.models.dit_config import DiTConfig

DEFAULTS = StreamConfig()


@dataclasses.dataclass(frozen=True)
class World:
    """A model of streamed frames, its codec and its actions."""

    params: Any
    config: DiTConfig
    codec: Codec
    captions: Captions
    actions: tuple[str, ...]  # names of the columns of an action; () for a world without actions
    size_HW: tuple[int, int]  # of the pictures, as in training
    fps: float  # frames per second, as in training
    caption: str  # of training's first clip
    times: TimeConfig
    objective: ObjectiveConfig
    settings: StreamConfig = DEFAULTS

    @classmethod
    def load(cls, model: str | Path, codec: str | Path | None = None, settings: StreamConfig = DEFAULTS) -> World:
        """The world of a model that `minisora train` exported.

        Args:
            model: The folder of the model.
            codec: That of its codec; None: the bundled one.
            settings: How frames are streamed.

        Raises:
            ValueError: The model cannot stream, or the codec is not its own.
        """
        parts, recorded = load_parts(model, codec or CODEC, None, None), load_config(model).get("world", {})
        loaded: Codec = parts["codec"]
        names = tuple(recorded.get("actions", ()))
        if (width := parts["config"].action_width) != action_width(len(names), loaded.config.time_factor) and width:
            raise ValueError(
                f"{model}/config.json names {len(names)} actions, and its model reads {width} numbers of a latent frame"
            )
        h, w = parts["sides"] or (0, 0)
        factor = loaded.config.space_factor
        kept = ("params", "config", "captions", "times", "objective")
        return cls(
            **{name: parts[name] for name in kept},
            codec=loaded,
            actions=names,
            size_HW=(h * factor, w * factor),
            fps=float(recorded.get("fps", 8.0)),
            caption=str(recorded.get("caption", "")),
            settings=dataclasses.replace(settings, window=min(settings.window, max(parts["window"] - 1, 1))),
        )

    def player(self, seed: int = 0) -> Player:
        """A new player at the beginning of a stream."""
        return Player(self, seed)

    def vector(self, action: str | Sequence[float] | None) -> np.ndarray:
        """The numbers of an action (A,): of a name, of several joined by " + ", of numbers, or zeros for None.

        Raises:
            ValueError: No action has this name, or the numbers are too few or too many.
        """
        vector = np.zeros(len(self.actions), np.float32)
        if isinstance(action, str):
            for name in action.split(" + "):
                if name not in self.actions:
                    raise ValueError(f"{name!r:.100} is no action of this world; those are {', '.join(self.actions)}")
                vector[self.actions.index(name)] = 1.0
        elif action is not None:
            if len(action) != len(vector) or not np.isfinite(action).all():
                raise ValueError(f"an action has {len(vector)} finite numbers, and this one is {list(action)!r:.100}")
            vector[:] = action
        return vector


class Player:
    """One walk through a world. `caption` may be changed at any frame.

    The codec's latent frames of f pixel frames take f actions at once: `step` takes one action for all of them.
    """

    def __init__(self, world: World, seed: int):
        self.world = world
        h, w = (side // world.codec.config.space_factor for side in world.size_HW)
        [self._empty_LE] = world.captions.encode([""])
        self._stream = Stream(
            world.params,
            world.config,
            (h, w),
            padded_text(self._empty_LE, world.config.caption_tokens),
            world.settings,
            times=world.times,
            objective=world.objective,
            fps=world.fps,
        )
        self.caption = world.caption
        self.reset(seed)

    def reset(self, seed: int = 0) -> None:
        """Begin again: the next step dreams a first frame."""
        self._stream.reset(seed)
        self._decode, self._encode = self.world.codec.decoder(), self.world.codec.encoder()
        self._encoded: tuple[str, np.ndarray] | None = None

    def show(self, frames_THWC: np.ndarray, actions_TA: np.ndarray | None = None) -> None:
        """Begin with frames that are known, uint8, and the actions that led to them (row 0 is not read).

        Raises:
            ValueError: The frames have another size than the world.
        """
        if frames_THWC.shape[1:] != (*self.world.size_HW, 3):
            raise ValueError(f"frames of {frames_THWC.shape[1:3]} pixels, and the world has {self.world.size_HW}")
        latents_thwc = self._encode(frames_THWC)
        self._decode(latents_thwc)
        vectors = [None] * len(latents_thwc)
        if actions_TA is not None:
            vectors = list(by_latent_frame(actions_TA, len(latents_thwc)))
        for latents_hwc, vector in zip(latents_thwc, vectors):
            self._stream.give(latents_hwc[None], vector, self._text())

    def step(self, action: str | Sequence[float] | None = None) -> np.ndarray:
        """The frames after this action, uint8 (f, H, W, 3); the first frame of a stream is one frame."""
        world, frames = self.world, self.world.codec.config.time_factor if self._stream.frame else 1
        vector = None
        if world.config.action_width:
            held_A = world.vector(action)
            known = np.zeros((1 + frames, len(held_A)), np.float32) + held_A
            vector = by_latent_frame(known, 2)[1] if self._stream.frame else by_latent_frame(0 * known[:1], 1)[0]
        latents_Bhwc = self._stream.next(vector, self._text())
        return self._decode(latents_Bhwc)

    def undo(self) -> None:
        """Forget the newest frame, in a world whose codec codes each frame by itself.

        Raises:
            ValueError: The codec's frames depend on those before them.
        """
        if not self.world.codec.config.images:
            raise ValueError("the codec of this world remembers earlier frames, so the newest cannot be undone")
        self._stream.undo()

    def _text(self) -> np.ndarray:
        """The features of the caption (1, L, E), encoded when it changes."""
        if self._encoded is None or self._encoded[0] != self.caption:
            [text_LE] = self.world.captions.encode([self.caption])
            self._encoded = (self.caption, padded_text(text_LE, self.world.config.caption_tokens))
        return self._encoded[1][None]
