"""The held-out clips that the tasks are measured on, and the scores that the measurements share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from minisora_jax.generate.pipeline import VideoPipeline
from minisora_jax.generate.request import Request
from minisora_jax.generate.runner import Task, run_tasks
from minisora_jax.toy.checker import check_all
from minisora_jax.toy.grammar import FPS, parse_caption
from minisora_jax.toy.shapes import Shapes
from minisora_jax.types import Clip

SIZE = (17, 48, 48)
OFFSET = 20_000  # the number of the first held-out clip that is used here; nothing else uses clips from there on
Rows = list[tuple[np.ndarray, str]]
Measured = tuple[dict, Rows]


def clips(
    count: int, size_THW: tuple[int, int, int] = SIZE, suits: Callable[[str], bool] = lambda motion: True
) -> list[Clip]:
    """The first `count` held-out clips of a size for which suits(motion of the first object) is true."""
    return [clip for clip, _ in zip(_suiting(size_THW, suits), range(count))]


def _suiting(size_THW: tuple[int, int, int], suits: Callable[[str], bool]) -> Iterator[Clip]:
    shapes = Shapes("heldout", 10**7, offset=OFFSET, size_THW=size_THW)
    for i in range(len(shapes)):
        clip = shapes[i]
        if len(clip.frames_THWC) == size_THW[0] and suits(parse_caption(clip.caption)[0][0].motion):
            yield clip


def in_sight(motion: str) -> bool:
    """Whether a motion stays visible, not behind a wall."""
    return not motion.startswith("hide")


def beside_a_still_camera(motion: str) -> bool:
    """Whether a motion stays visible, and the camera rests."""
    return not motion.startswith(("hide", "pan"))


def requests(truth: Sequence[Clip], size_THW: tuple[int, int, int] | None = None) -> list[Request]:
    """A request for each clip, with its caption and size. The seed is the clip's place in the list."""
    return [Request(c.caption, size_THW or c.size_THW, seed=i, fps=FPS) for i, c in enumerate(truth)]


def attributes(videos: Sequence[np.ndarray], captions: Sequence[str]) -> tuple[dict, list[str]]:
    """({"colour": share of right videos, ...}, the wrong attributes of each video), by the checker."""
    hits, by_motion, errors = check_all(videos, captions)
    kinds = {k: [mean(v), len(v)] for k, v in by_motion.items()}
    return {k: mean(v) for k, v in hits.items()} | {"motion_by_kind": kinds}, errors


def mean(values: Sequence[Any]) -> float:
    return round(float(np.mean(values)), 4) if len(values) else float("nan")


def share(values: Sequence[float], most: float) -> float:
    """The share of values that are at most `most`."""
    return mean([v <= most for v in values])


def rows(videos: Sequence[np.ndarray], captions: Sequence[str], notes: Sequence[str] | None = None) -> Rows:
    notes = notes or [""] * len(videos)
    return [(v, c + (f"   {n}" if n else "")) for v, c, n in zip(videos, captions, notes)]


def checked(videos: Sequence[np.ndarray], truth: Sequence[Clip], **more: Any) -> Measured:
    """The checker's scores of the captions of `truth`, with `more` scores, and the rows."""
    captions = [c.caption for c in truth]
    scores, errors = attributes(videos, captions)
    return scores | more, rows(videos, captions, [f"WRONG: {e}" if e else "" for e in errors])


def pairs(truth: Sequence[Clip]) -> list[tuple[Request, Clip]]:
    return list(zip(requests(truth), truth))


def run(pipeline: VideoPipeline, work: Sequence[Task], options: dict) -> list[np.ndarray]:
    return run_tasks(pipeline, work, **options)
