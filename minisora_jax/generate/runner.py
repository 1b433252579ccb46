"""Many verbs at once: what they ask for at one time goes through the codec and the model together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Sequence

import numpy as np

from minisora_jax.generate.request import Request


@dataclasses.dataclass(frozen=True)
class Encode:
    """Answered with latents (t, h, w, c) of uint8 frames, 1 + 4k of them."""

    frames_THWC: np.ndarray


@dataclasses.dataclass(frozen=True)
class Decode:
    """Answered with uint8 frames of latents (t, h, w, c)."""

    latents_thwc: np.ndarray
    loop: bool = False


@dataclasses.dataclass(frozen=True)
class Frames:
    """Some of the result, uint8 (T, H, W, 3). Not answered."""

    frames_THWC: np.ndarray


Verb = Generator  # of Encode, Request, Decode and Frames, sent their answers


def altered(verb: Verb, alter: Callable[[np.ndarray | None], np.ndarray | None]) -> Verb:
    """A verb whose frames are what `alter` makes of them as they come, and at last of None; it may give None, too."""
    answer = None
    while True:
        try:
            asked = verb.send(answer)
        except StopIteration:
            break
        if not isinstance(asked, Frames):
            answer = yield asked
            continue
        answer = None
        if (some := alter(asked.frames_THWC)) is not None:
            yield Frames(some)
    if (rest := alter(None)) is not None:
        yield Frames(rest)


def perform(
    generator,
    verbs: Sequence[Verb],
    *,
    write: Callable[[int, np.ndarray], None] | None = None,
    watch: Callable[[float, Callable[[], dict[int, np.ndarray]]], None] | None = None,
    failed: Callable[[int, ValueError], None] | None = None,
    **options,
) -> list[np.ndarray] | None:
    """The frames of each verb, uint8 (T, H, W, 3); or `write(number, frames)` is called with them as they come.

    options and `watch` are those of `Generator.sample`, but that look() gives latents by verb, of those sampled now.
    What the verbs ask for at one time goes through the model together. A verb that finds that it cannot be done is left
    out, and `failed` called with its error; without that it is raised.
    """
    pieces: list[list[np.ndarray]] = [[] for _ in verbs]
    write = write or (lambda i, frames: pieces[i].append(frames))
    waiting = {}

    def go_on(i: int, answer) -> None:
        try:
            asked = verbs[i].send(answer)
            while isinstance(asked, Frames):
                write(i, asked.frames_THWC)
                asked = verbs[i].send(None)
            waiting[i] = asked
        except StopIteration:
            waiting.pop(i, None)
        except ValueError as error:
            if failed is None:
                raise
            waiting.pop(i, None)
            failed(i, error)

    def answers(kind: type, asking: list[int]) -> list[np.ndarray]:
        some = [waiting[i] for i in asking]
        if kind is Encode:
            return generator.encode([a.frames_THWC for a in some])
        if kind is Decode:
            return generator.decode([a.latents_thwc for a in some], [a.loop for a in some])
        by_verb = lambda look: lambda: {asking[k]: latents for k, latents in look().items()}
        seen = watch and (lambda share, look: watch(share, by_verb(look)))
        return generator.sample(some, watch=seen, **options)

    for i in range(len(verbs)):
        go_on(i, None)
    while waiting:
        for kind in (Encode, Request, Decode):
            asking = [i for i, asked in waiting.items() if isinstance(asked, kind)]
            if asking:
                for i, result in zip(asking, answers(kind, asking), strict=True):
                    go_on(i, result)
    return [np.concatenate(some) for some in pieces] if any(pieces) else None
