"""Measure loops and transitions: the steps between frames, and ghosts.

A video is ghost-free if in each of its frames every object of its caption is there once, opaque, and near its place in
the frame before (toy/ghosts.py). A cross-fade passes the measures of steps, and not this one.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from minisora_jax.evaluation.frames import seam
from minisora_jax.evaluation.heldout import (
    OFFSET,
    SIZE,
    Measured,
    attributes,
    beside_a_still_camera,
    checked,
    clips,
    in_sight,
    mean,
    pairs,
    requests,
    rows,
    run,
    share,
)
from minisora_jax.generate import tasks
from minisora_jax.generate.frame_ops import largest_step, steps
from minisora_jax.generate.pipeline import VideoPipeline
from minisora_jax.toy.ghosts import ghosts
from minisora_jax.toy.grammar import FPS, Scene, caption, parse_caption
from minisora_jax.toy.scenes import place_again, sample_scene
from minisora_jax.toy.shapes import render
from minisora_jax.types import Clip

FORTH = 9  # frames of a loop of 16 before its way back


def ghost_scores(videos: Sequence[np.ndarray], truth: Sequence[Clip], *, loop: bool = False) -> tuple[dict, list[str]]:
    """({"ghost_free": the share of such videos, "ghosts": videos by fault}, the faults of each video)."""
    faults = [ghosts(v, [o.colour for o in parse_caption(c.caption)[0]], loop=loop) for v, c in zip(videos, truth)]
    counts = collections.Counter(fault for each in faults for fault in each)
    notes = [", ".join(f"{fault} in {len(frames)}" for fault, frames in each.items()) for each in faults]
    return {"ghost_free": mean([not each for each in faults]), "ghosts": dict(counts)}, notes


def loop(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """Loops of 16 frames: the step from the last frame to the first.

    "motion_there" is the share whose first 9 frames, before the way back, move as told. Of loops made on a circle,
    "joint" is the step two frames after the seam, where the last latent frame meets the first, and "other_joint" is
    where the first latent frame meets the second.
    """
    truth = clips(count, suits=in_sight)
    looped = [dataclasses.replace(r, size_THW=(16, *SIZE[1:]), loop=True) for r in requests(truth)]
    videos = pipeline.generate(looped, **options)
    plain = pipeline.generate([dataclasses.replace(r, size_THW=SIZE, loop=False) for r in looped], **options)
    seams = [seam(v) for v in videos]
    captions = [c.caption for c in truth]
    scores, _ = attributes(videos, captions)
    by_motion = collections.defaultdict(list)
    for clip, s in zip(truth, seams):
        by_motion[parse_caption(clip.caption)[0][0].motion].append(s <= 1.5)
    more = {
        "seam_median": round(float(np.median(seams)), 3),
        "seam_at_most_1.5": share(seams, 1.5),
        "joint_at_most_1.5": share([seam(np.roll(v, 2, axis=0)) for v in videos], 1.5),
        "other_joint_at_most_1.5": share([seam(np.roll(v, -2, axis=0)) for v in videos], 1.5),
        "seam_at_most_1.5_by_motion": {k: [mean(v), len(v)] for k, v in sorted(by_motion.items())},
        "without_loop_at_most_1.5": share([seam(v[:-1]) for v in plain], 1.5),
        "motion_there": attributes([v[:FORTH] for v in videos], captions)[0]["motion"],
        "still_videos": mean([np.median(steps(v)) < 0.2 for v in videos]),
    }
    found, notes = ghost_scores(videos, truth, loop=True)
    more |= found | {"ghost_free_plain": ghost_scores(plain, truth)[0]["ghost_free"]}
    notes = [f"seam {s:.2f} {note}" for s, note in zip(seams, notes)]
    twice = [np.concatenate([v, v]) for v in videos]
    return {k: scores[k] for k in ("colour", "shape", "motion")} | more, rows(twice, captions, notes)


def transition(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """7 new frames between both ends of a true clip, 5 frames each: the largest new step, and the checker's scores."""
    truth = clips(count, suits=in_sight)
    ends = [(c.frames_THWC[:5], c.frames_THWC[12:]) for c in truth]
    videos = run(
        pipeline,
        [tasks.transition(pipeline, r, a, b, between=7) for (r, _), (a, b) in zip(pairs(truth), ends)],
        options,
    )
    largest = [largest_step(v, slice(4, 12)) for v in videos]
    more = {
        "largest_step": round(float(np.median(largest)), 3),
        "no_step_above_2": share(largest, 2.0),
        "true_no_step_above_2": share([largest_step(c.frames_THWC, slice(4, 12)) for c in truth], 2.0),
    }
    return checked(videos, truth, **more, **ghost_scores(videos, truth)[0])


def transition_strangers(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """11 new frames between two videos of one caption with different seeds: the largest new step, and ghosts.

    "ghost_free" is the share of all, "ghost_free_of_whole" that of the pairs whose two videos have no ghosts.
    """
    truth = clips(count, suits=beside_a_still_camera)
    base = requests(truth)
    a, b = (
        pipeline.generate([dataclasses.replace(r, seed=r.seed + shift) for r in base], **options) for shift in (0, 5000)
    )
    whole = [not any(found) for found in zip(ghost_scores(a, truth)[1], ghost_scores(b, truth)[1])]
    return _led_over(pipeline, truth, a, b, whole, options)


def transition_true(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """11 new frames between two true clips of one caption, whose objects are in other places; as the strangers."""
    scenes = _scenes(count)
    truth = [Clip(render(scene), caption(scene), FPS, "a") for scene in scenes]
    b = [render(place_again(np.random.default_rng(i), scene)) for i, scene in enumerate(scenes)]
    return _led_over(pipeline, truth, [c.frames_THWC for c in truth], b, [True] * count, options)


def _scenes(count: int) -> list[Scene]:
    """The scenes of held-out clips of `SIZE` whose objects can be placed again."""
    scenes = (sample_scene(i, "heldout", SIZE) for i in itertools.count(OFFSET))
    suits = lambda scene: scene.size_THW == SIZE and beside_a_still_camera(scene.objects[0].motion)
    return list(itertools.islice(filter(suits, scenes), count))


def _led_over(pipeline, truth, a, b, whole: list[bool], options: dict) -> Measured:
    """Scores of the transitions from videos `a` to videos `b`; `whole`: pairs without ghosts of their own."""
    pairs_of = zip(requests(truth), a, b)
    videos = run(pipeline, [tasks.transition(pipeline, r, *ends, between=11) for r, *ends in pairs_of], options)
    largest = [largest_step(v, slice(16, 28)) for v in videos]
    found, notes = ghost_scores(videos, truth)
    scores = {"largest_step": round(float(np.median(largest)), 3), "no_step_above_2": share(largest, 2.0)} | found
    scores |= {"pairs_whole": sum(whole), "ghost_free_of_whole": mean([not n for n, w in zip(notes, whole) if w])}
    notes = [f"{n:.2f} steps {note}" for n, note in zip(largest, notes)]
    return scores, rows([v[8:36] for v in videos], [c.caption for c in truth], notes)
