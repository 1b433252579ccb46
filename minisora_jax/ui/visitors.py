"""Visitors of a world: each has a player of their own, and one thread steps all of them in turn.

    hear(token, message) -> Wish -> the thread steps the player -> pictures -> the visitor's stream (play.py)

Nothing queues up. Of what a visitor says the newest message counts. A player is stepped when its next frame is due,
and only while the visitor has seen all but the last few frames; so a slow connection makes a world slow, not late.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
import logging
import secrets
import threading
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

from minisora_jax.generate.world import Player, World
from minisora_jax.io.filesystem import json_or_none, printable
from minisora_jax.ui.controls import held_action
from minisora_jax.ui.uploads import InvalidInput

log = logging.getLogger("minisora")

MOST_VISITORS = 4
AHEAD = 3  # frames that a visitor may not have seen yet when the next one is made
LATE = 0.02  # seconds by which a step may begin too late and the next one is not put off
AWAY = 300.0  # seconds without a new action or word, after which the place is free for others
MOST_MESSAGE = 4096  # bytes
MOST_CAPTION = 300  # characters
JPEG = {"format": "jpeg", "quality": 92, "subsampling": 0}

Beginning = Callable[[Player, int], np.ndarray]  # shows a player known frames; the last of them (H, W, 3)


@dataclasses.dataclass(frozen=True)
class Wish:
    """What a visitor wants, as their newest message says."""

    number: int = 0  # of the message
    seen: int = 0  # frames that were shown
    resets: int = 0  # times that the visitor wanted to begin again
    actions: tuple[str, ...] = ()  # held down, the newest last
    caption: str | None = None  # None: as it is

    @classmethod
    def read(cls, message: bytes, actions: tuple[str, ...]) -> Wish:
        """The wish of a message in JSON, which may come from a stranger.

        Raises:
            InvalidInput: A sentence for the visitor.
        """
        if len(message) > MOST_MESSAGE:
            raise InvalidInput(f"a message has at most {MOST_MESSAGE} bytes, and this one has {len(message)}")
        value = json_or_none(message.decode("utf-8", "replace"))
        fields = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(value, dict) or not value.keys() <= fields:
            raise InvalidInput(f"a message is a JSON object of {', '.join(sorted(fields))}")
        for name in ("number", "seen", "resets"):
            if type(value.get(name, 0)) is not int or not 0 <= value.get(name, 0) < 2**53:
                raise InvalidInput(f"{name}={value[name]!r:.100} must be a whole number from 0 to 2^53 - 1")
        held = value.get("actions", [])
        if not isinstance(held, list) or len(held) > 16 or not all(isinstance(name, str) for name in held):
            raise InvalidInput("actions must be a list of at most 16 names")
        if unknown := [name for name in held if name not in actions]:
            shown = printable(unknown[0])[:100]
            raise InvalidInput(f"{shown!r} is no action of this world; those are {', '.join(actions) or 'none'}")
        caption = value.get("caption")
        if caption is not None and (not isinstance(caption, str) or len(caption) > MOST_CAPTION):
            raise InvalidInput(f"caption must be a text of at most {MOST_CAPTION} characters")
        if caption and any("\ud800" <= character <= "\udfff" for character in caption):
            raise InvalidInput("caption must be a text, and it has half of a character")
        number, seen, resets = (value.get(name, 0) for name in ("number", "seen", "resets"))
        return cls(number, seen, resets, tuple(dict.fromkeys(held)), caption)


@dataclasses.dataclass(frozen=True)
class Picture:
    """A frame for a visitor."""

    due: float  # when to send it, by `time.monotonic`: the frames of one step follow at the world's rate
    frame: int  # its number, from 1
    heard: int  # number of the newest message that counted for it
    step_ms: float  # the time that its step took
    data: bytes  # JPEG


class Visitor:
    """One walk: what the visitor wants, and the pictures that are on their way. `token` is known to them alone."""

    def __init__(self, seed: int, wake: Callable[[], None]):
        self.token, self.seed, self.wake = secrets.token_urlsafe(16), seed, wake
        self.wish, self.resets = Wish(), 0
        self.player: Player | None = None
        self.pictures: collections.deque[Picture] = collections.deque()
        self.made, self.due, self.active = 0, 0.0, time.monotonic()
        self.end = ""  # why the walk is over

    def hear(self, wish: Wish) -> None:
        """Take over a message, unless a newer one came before it."""
        if wish.number < self.wish.number:
            return
        same = dataclasses.replace(wish, number=self.wish.number, seen=self.wish.seen)
        if same != self.wish:
            self.active = time.monotonic()
        self.wish = wish


class Visitors:
    """The visitors of a world, and the thread that steps their players.

    Args:
        world: Whose players they get.
        begin: Shows a new player the frames of a seed; None: each begins with a dream.
        seed: Of the first visitor; the next ones count up.
        most: Visitors at one time.
    """

    def __init__(self, world: World, begin: Beginning | None = None, seed: int = 0, most: int = MOST_VISITORS):
        self.world, self.begin, self.most = world, begin, most
        self._seed, self._closed = seed, False
        self._here: dict[str, Visitor] = {}
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="world", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        return len(self._here)

    def enter(self, wake: Callable[[], None]) -> Visitor:
        """A new visitor. `wake` is called, from the thread, when there are new pictures or the walk ends.

        Raises:
            InvalidInput: All places are taken.
        """
        with self._changed:
            self._free_places()
            if len(self._here) >= self.most:
                raise InvalidInput(
                    f"all {self.most} places of this world are taken: try again when somebody has left (a place is "
                    f"free after {AWAY / 60:g} minutes without a key)"
                )
            visitor = Visitor(self._next_seed(), wake)
            self._here[visitor.token] = visitor
            self._changed.notify()
        return visitor

    def leave(self, visitor: Visitor, why: str = "") -> None:
        """Free the visitor's place."""
        with self._changed:
            if self._here.pop(visitor.token, None):
                visitor.end = why
                visitor.wake()

    def hear(self, token: str, message: bytes) -> None:
        """Take over a visitor's message.

        Raises:
            LookupError: There is no such visitor (any more).
            InvalidInput: The message is none.
        """
        visitor = self._here[token]
        wish = Wish.read(message, self.world.actions)
        with self._changed:
            visitor.hear(wish)
            self._changed.notify()

    def close(self) -> None:
        """Send all visitors home, and end the thread."""
        for visitor in list(self._here.values()):
            self.leave(visitor, "the world has closed")
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout=10)

    # ---- The thread

    def _run(self) -> None:
        while visitor := self._next_due():
            try:
                self._step(visitor)
            except Exception as error:
                log.error("a walk ended by %s: %s", type(error).__name__, printable(str(error))[:1000])
                self.leave(visitor, "the world failed here: its owner's log says why")

    def _next_due(self) -> Visitor | None:
        """The visitor who waits longest for a frame, once there is one; None at the end."""
        with self._changed:
            while not self._closed:
                self._free_places()
                ready = [v for v in self._here.values() if max(v.made - v.wish.seen, len(v.pictures)) <= AHEAD]
                first = min(ready, key=lambda v: v.due, default=None)
                left = first.due - time.monotonic() if first else 1.0
                if first and left <= 0:
                    return first
                self._changed.wait(min(left, 1.0))
        return None

    def _step(self, visitor: Visitor) -> None:
        """Make the next frames of a visitor's walk."""
        wish, start = visitor.wish, time.monotonic()
        frames_THWC = self._shown(visitor, wish)
        if frames_THWC is None:
            assert visitor.player is not None
            if wish.caption is not None:
                visitor.player.caption = wish.caption
            frames_THWC = visitor.player.step(held_action(self.world.actions, wish.actions))
        end = time.monotonic()
        for i, frame_HWC in enumerate(frames_THWC):
            visitor.made += 1
            due, ms = end + i / self.world.fps, 1000 * (end - start)
            visitor.pictures.append(Picture(due, visitor.made, wish.number, ms, _jpeg(frame_HWC)))
        visitor.due = max(visitor.due, start - LATE) + len(frames_THWC) / self.world.fps
        visitor.wake()

    def _shown(self, visitor: Visitor, wish: Wish) -> np.ndarray | None:
        """At a beginning, the last of the frames that the player is shown (1, H, W, 3); None if there are none."""
        if visitor.player is not None and wish.resets == visitor.resets:
            return None
        if visitor.player is None:
            visitor.player = self.world.player(visitor.seed)
        else:
            visitor.seed = self._next_seed()
            visitor.player.reset(visitor.seed)
        visitor.resets = wish.resets
        return self.begin(visitor.player, visitor.seed)[None] if self.begin else None

    def _free_places(self) -> None:
        for visitor in [v for v in self._here.values() if time.monotonic() - v.active > AWAY]:
            minutes = f"{AWAY / 60:g}"
            self.leave(visitor, f"nothing was pressed for {minutes} minutes, so your place is free for others")

    def _next_seed(self) -> int:
        with self._changed:
            self._seed += 1
            return self._seed - 1


def _jpeg(frame_HWC: np.ndarray) -> bytes:
    with contextlib.closing(io.BytesIO()) as file:
        Image.fromarray(frame_HWC).save(file, **JPEG)
        return file.getvalue()
