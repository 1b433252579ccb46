"""Many tasks at once: what they need at one time goes through the codec and the model together."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np

from minisora_jax.generate.native import NativePipeline, Watch
from minisora_jax.generate.request import Request
from minisora_jax.generate.sampling import require_finite

log = logging.getLogger("minisora")

ONE_COLOUR = "a sign of damaged weights, of a codec that is not the model's, or of too much guidance"


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
    """A piece of the result, uint8 (T, H, W, 3). Not answered."""

    frames_THWC: np.ndarray


@dataclasses.dataclass(frozen=True)
class Note:
    """What the result's record should say about it, such as {"faded": True}. Not answered."""

    entries: dict[str, Any]


Task = Generator[Encode | Decode | Frames | Note | Request, Any, Any]


def collected(task: Task) -> Task:
    """Returns all frames of a task, uint8 (T, H, W, 3), instead of yielding them."""
    pieces: list[np.ndarray] = []

    def keep(frames_THWC: np.ndarray | None) -> None:
        if frames_THWC is not None:
            pieces.append(frames_THWC)

    yield from altered(task, keep)
    return np.concatenate(pieces)


def altered(task: Task, alter: Callable[[np.ndarray | None], np.ndarray | None]) -> Task:
    """A task whose frames go through `alter` as they come, and None at the end. `alter` may return None for nothing."""
    answer = None
    while True:
        try:
            need = task.send(answer)
        except StopIteration:
            break
        if not isinstance(need, Frames):
            answer = yield need
            continue
        answer = None
        if (frames := alter(need.frames_THWC)) is not None:
            yield Frames(frames)
    if (rest := alter(None)) is not None:
        yield Frames(rest)


def _two_colours(frames_THWC: np.ndarray) -> set[tuple[int, ...]]:
    """The first pixel's colour, and another if there is one."""
    if not frames_THWC.size:
        return set()
    pixels = frames_THWC.reshape(-1, frames_THWC.shape[-1])
    other = pixels[(pixels != pixels[0]).any(-1).argmax()]
    return {tuple(map(int, pixels[0])), tuple(map(int, other))}


def run_tasks(
    pipeline: NativePipeline,
    tasks: Sequence[Task],
    *,
    write: Callable[[int, np.ndarray], None] | None = None,
    watch: Watch | None = None,
    failed: Callable[[int, ValueError], None] | None = None,
    note: Callable[[int, dict[str, Any]], None] = lambda i, entries: None,
    **options,
) -> list[np.ndarray]:
    """Run tasks together.

    Args:
        pipeline: the model and codec that answer what the tasks need.
        tasks: generators of tasks.py.
        write: called with (number of the task, frames) for each piece; without it the pieces are returned.
        watch: as in `NativePipeline.sample`, with latents by number of task, of those sampled now.
        failed: called with (number, error) for a task that cannot be done, which is left out; without it, raised.
        note: called with (number, entries) of each `Note` of a task; with "one_colour" for a result that shows no more.
        **options: those of `NativePipeline.sample`.

    Returns:
        uint8 frames (T, H, W, 3) of each task that gave any; [] with `write`.
    """
    pieces: list[list[np.ndarray]] = [[] for _ in tasks]
    write_piece = write or (lambda i, frames: pieces[i].append(frames))
    waiting: dict[int, Encode | Decode | Request] = {}
    colours: list[set[tuple[int, ...]]] = [set() for _ in tasks]  # of each result: a colour, and another if one occurs

    def go_on(i: int, answer) -> None:
        try:
            if isinstance(need := waiting.get(i), Request):
                require_finite(answer, need)
            need = tasks[i].send(answer)
            while isinstance(need, Frames | Note):
                if isinstance(need, Note):
                    note(i, need.entries)
                else:
                    write_piece(i, need.frames_THWC)
                    colours[i] |= _two_colours(need.frames_THWC)
                need = tasks[i].send(None)
            waiting[i] = need
        except StopIteration:
            waiting.pop(i, None)
            if len(colours[i]) == 1:
                [colour] = colours[i]
                note(i, {"one_colour": list(colour)})
                log.warning("result %d shows one colour only, %s: %s", i, colour, ONE_COLOUR)
        except ValueError as error:
            if failed is None:
                raise
            waiting.pop(i, None)
            failed(i, error)

    def answers(numbers: list[int], needs: list) -> list[np.ndarray]:
        if isinstance(needs[0], Encode):
            return pipeline.encode([need.frames_THWC for need in needs])
        if isinstance(needs[0], Decode):
            return pipeline.decode([need.latents_thwc for need in needs], [need.loop for need in needs])
        by_task = lambda look: lambda: {numbers[k]: latents for k, latents in look().items()}
        on_step = watch and functools.partial(lambda watch, share, look: watch(share, by_task(look)), watch)
        return pipeline.sample(needs, watch=on_step, **options)

    for i in range(len(tasks)):
        go_on(i, None)
    while waiting:
        for kind in (Encode, Request, Decode):
            numbers = [i for i, need in waiting.items() if isinstance(need, kind)]
            if numbers:
                for i, answer in zip(numbers, answers(numbers, [waiting[i] for i in numbers]), strict=True):
                    go_on(i, answer)
    return [np.concatenate(piece) for piece in pieces if piece]
