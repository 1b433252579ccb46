"""Measure every task on held-out captions of the procedural clips.

    image-to-video  the first frame of a true clip, and its caption   colour, shape and motion, by the checker
    extend-forward  the first half of a true clip                     the same, and the PSNR at the seam
    transition      both ends of a true clip                          the largest new step, in median steps
    loop            a caption                                         the step from the last frame to the first
    ...             `TASKS` lists them all

A measurement takes (pipeline, count, options) and returns (scores, rows of a contact sheet). `options` are further
arguments of `pipeline.generate`. Shares are between 0 and 1, PSNR is in dB, and steps are in median steps of the video.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from minisora_jax.evaluation.frames import bounce, flicker, psnr, seam
from minisora_jax.generate import tasks
from minisora_jax.generate.frame_ops import FEATHER, largest_step, steps
from minisora_jax.generate.pipeline import VideoPipeline
from minisora_jax.generate.request import Request
from minisora_jax.generate.runner import Task, run_tasks
from minisora_jax.toy.checker import check_all, observe
from minisora_jax.toy.shapes import FPS, Shapes, parse_caption
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


def requests(truth: Sequence[Clip], size_THW: tuple[int, int, int] | None = None) -> list[Request]:
    """A request for each clip, with its caption and size. The seed is the clip's place in the list."""
    return [Request(c.caption, size_THW or c.size_THW, seed=i, fps=FPS) for i, c in enumerate(truth)]


def attributes(videos: Sequence[np.ndarray], captions: Sequence[str]) -> tuple[dict, list[str]]:
    """({"colour": share of right videos, ...}, the wrong attributes of each video), by the checker."""
    hits, by_motion, errors = check_all(videos, captions)
    kinds = {k: [_mean(v), len(v)] for k, v in by_motion.items()}
    return {k: _mean(v) for k, v in hits.items()} | {"motion_by_kind": kinds}, errors


def _mean(values: Sequence[Any]) -> float:
    return round(float(np.mean(values)), 4) if len(values) else float("nan")


def _share(values: Sequence[float], most: float) -> float:
    """The share of values that are at most `most`."""
    return _mean([v <= most for v in values])


def _rows(videos: Sequence[np.ndarray], captions: Sequence[str], notes: Sequence[str] | None = None) -> Rows:
    notes = notes or [""] * len(videos)
    return [(v, c + (f"   {n}" if n else "")) for v, c, n in zip(videos, captions, notes)]


def _checked(videos: Sequence[np.ndarray], truth: Sequence[Clip], **more: Any) -> Measured:
    """The checker's scores of the captions of `truth`, with `more` scores, and the rows."""
    captions = [c.caption for c in truth]
    scores, errors = attributes(videos, captions)
    return scores | more, _rows(videos, captions, [f"WRONG: {e}" if e else "" for e in errors])


# ---- Measurements


def text_to_video(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """Videos from captions: colour, shape and motion; and flicker, beside that of true clips."""
    truth = clips(count)
    videos = pipeline.generate(requests(truth), **options)
    more = {
        "flicker": _mean([flicker(v) for v in videos]),
        "flicker_true": _mean([flicker(c.frames_THWC) for c in truth]),
    }
    return _checked(videos, truth, **more)


def text_to_image(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """Images of 64 x 64 pixels from captions: colour and shape."""
    truth = clips(count, (1, 64, 64))
    return _checked(pipeline.generate(requests(truth), **options), truth)


def image_to_video(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """Videos that begin with the first frame of a true clip: colour, shape, motion, and the PSNR of the first frame."""
    truth = clips(count, suits=in_sight)
    videos = _run(pipeline, [tasks.image_to_video(pipeline, r, c.frames_THWC[0]) for r, c in _pairs(truth)], options)
    kept = [psnr(v[0], c.frames_THWC[0]) for v, c in zip(videos, truth)]
    return _checked(videos, truth, first_frame_psnr=_mean(kept))


def interpolate(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """Videos from the first frame of a true clip to its last: colour, shape, and the PSNR of both frames."""
    truth = clips(count, suits=lambda motion: not motion.startswith(("hide", "pan")))
    videos = _run(
        pipeline,
        [tasks.interpolate(pipeline, r, c.frames_THWC[0], c.frames_THWC[-1]) for r, c in _pairs(truth)],
        options,
    )
    ends = {
        "first_frame_psnr": _mean([psnr(v[0], c.frames_THWC[0]) for v, c in zip(videos, truth)]),
        "last_frame_psnr": _mean([psnr(v[-1], c.frames_THWC[-1]) for v, c in zip(videos, truth)]),
    }
    scores, rows = _checked(videos, truth, **ends)
    return {k: v for k, v in scores.items() if not k.startswith("motion")}, rows


def extend_forward(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """8 frames after the first 9 frames of true clips; see `_extend`."""
    return _extend(pipeline, count, options, given=slice(None, 9), new={"after": 8})


def extend_backward(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """8 frames before the last 9 frames of true clips; see `_extend`."""
    return _extend(pipeline, count, options, given=slice(8, None), new={"before": 8})


def _extend(pipeline: VideoPipeline, count: int, options: dict, given: slice, new: dict[str, int]) -> Measured:
    """Extend half of a true clip. The whole video is checked, and the step where given frames meet new ones.

    "seam_psnr" compares the given frame at the seam with the input. "codec_psnr" does so for the codec alone.

    Args:
        given: the frames of the clip that are given.
        new: the number of new frames, as the argument `before` or `after` of `tasks.extend`.
    """
    truth = clips(count, suits=in_sight)
    inputs = [c.frames_THWC[given] for c in truth]
    videos = _run(pipeline, [tasks.extend(pipeline, r, x, **new) for (r, _), x in zip(_pairs(truth), inputs)], options)
    at = 8 if "after" in new else 7
    beside = -1 if "after" in new else 0
    coded = pipeline.decode(pipeline.encode(inputs))
    more = {
        "known_psnr": _mean([psnr(v[given], x) for v, x in zip(videos, inputs)]),
        "seam_psnr": _mean([psnr(v[given][beside], x[beside]) for v, x in zip(videos, inputs)]),
        "seam_psnr_at_least_30": _mean([psnr(v[given][beside], x[beside]) >= 30 for v, x in zip(videos, inputs)]),
        "codec_psnr": _mean([psnr(z[beside], x[beside]) for z, x in zip(coded, inputs)]),
        "seam_steps": _mean([largest_step(v, slice(at, at + 1)) for v in videos]),
        "seam_at_most_2": _share([largest_step(v, slice(at, at + 1)) for v in videos], 2.0),
        "true_seam_at_most_2": _share([largest_step(c.frames_THWC, slice(at, at + 1)) for c in truth], 2.0),
    }
    return _checked(videos, truth, **more)


def loop(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """Loops of 16 frames: the step from the last frame to the first.

    "joint" is the step two frames later, where the last latent frame meets the first. "other_joint" is the step where
    the first latent frame meets the second.
    """
    truth = clips(count, suits=in_sight)
    looped = [dataclasses.replace(r, size_THW=(16, *SIZE[1:]), loop=True) for r in requests(truth)]
    videos = pipeline.generate(looped, **options)
    plain = pipeline.generate([dataclasses.replace(r, size_THW=SIZE, loop=False) for r in looped], **options)
    seams = [seam(v) for v in videos]
    scores, _ = attributes(videos, [c.caption for c in truth])
    by_motion = collections.defaultdict(list)
    for clip, s in zip(truth, seams):
        by_motion[parse_caption(clip.caption)[0][0].motion].append(s <= 1.5)
    more = {
        "seam_median": round(float(np.median(seams)), 3),
        "seam_at_most_1.5": _share(seams, 1.5),
        "joint_at_most_1.5": _share([seam(np.roll(v, 2, axis=0)) for v in videos], 1.5),
        "other_joint_at_most_1.5": _share([seam(np.roll(v, -2, axis=0)) for v in videos], 1.5),
        "seam_at_most_1.5_by_motion": {k: [_mean(v), len(v)] for k, v in sorted(by_motion.items())},
        "without_loop_at_most_1.5": _share([seam(v[:-1]) for v in plain], 1.5),
        "still_videos": _mean([np.median(steps(v)) < 0.2 for v in videos]),
    }
    rows = _rows([np.concatenate([v, v]) for v in videos], [c.caption for c in truth], [f"seam {s:.2f}" for s in seams])
    return {k: v for k, v in scores.items() if k in ("colour", "shape", "motion")} | more, rows


def transition(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """7 new frames between both ends of a true clip, 5 frames each: the largest new step, and the checker's scores."""
    truth = clips(count, suits=in_sight)
    ends = [(c.frames_THWC[:5], c.frames_THWC[12:]) for c in truth]
    videos = _run(
        pipeline,
        [tasks.transition(pipeline, r, a, b, between=7) for (r, _), (a, b) in zip(_pairs(truth), ends)],
        options,
    )
    largest = [largest_step(v, slice(4, 12)) for v in videos]
    more = {
        "largest_step": round(float(np.median(largest)), 3),
        "no_step_above_2": _share(largest, 2.0),
        "true_no_step_above_2": _share([largest_step(c.frames_THWC, slice(4, 12)) for c in truth], 2.0),
    }
    return _checked(videos, truth, **more)


def transition_strangers(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """11 new frames between two videos of one caption with different seeds: the largest new step."""
    truth = clips(count, suits=lambda motion: not motion.startswith(("hide", "pan")))
    base = requests(truth)
    a, b = (
        pipeline.generate([dataclasses.replace(r, seed=r.seed + shift) for r in base], **options) for shift in (0, 5000)
    )
    videos = _run(pipeline, [tasks.transition(pipeline, r, *ends, between=11) for r, *ends in zip(base, a, b)], options)
    largest = [largest_step(v, slice(16, 28)) for v in videos]
    scores = {"largest_step": round(float(np.median(largest)), 3), "no_step_above_2": _share(largest, 2.0)}
    return scores, _rows([v[8:36] for v in videos], [c.caption for c in truth], [f"{n:.2f} steps" for n in largest])


def video_to_video(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """Recolour the object of a true clip: the new colour, and the old shape and motion."""
    truth = clips(count, suits=in_sight)
    recoloured = [c.caption.replace(o := parse_caption(c.caption)[0][0].colour, RECOLOURED[o], 1) for c in truth]
    prompted = [dataclasses.replace(r, prompt=p) for (r, _), p in zip(_pairs(truth), recoloured)]
    single = [i for i, c in enumerate(truth) if len(parse_caption(c.caption)[0]) == 1]
    videos = _run(
        pipeline, [tasks.video_to_video(pipeline, prompted[i], truth[i].frames_THWC, STRENGTH) for i in single], options
    )
    expected = [dataclasses.replace(truth[i], caption=recoloured[i]) for i in single]
    return _checked(videos, expected, strength=STRENGTH)


STRENGTH = 0.85
RECOLOURED = {"red": "green", "green": "blue", "blue": "orange", "yellow": "magenta", "cyan": "red", "magenta": "cyan",
              "orange": "white", "white": "yellow"}  # fmt: skip


def inpaint(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """Generate the pixels right of column 16 of a true clip anew, by its caption; "kept_psnr" is of the others."""
    truth = clips(count, suits=in_sight)
    mask = np.zeros(SIZE[1:], bool)
    mask[:, 16:] = True
    videos = _run(pipeline, [tasks.inpaint(pipeline, r, c.frames_THWC, mask) for r, c in _pairs(truth)], options)
    away = [psnr(v[:, :, : 16 - FEATHER], c.frames_THWC[:, :, : 16 - FEATHER]) for v, c in zip(videos, truth)]
    return _checked(videos, truth, kept_psnr=_mean(away))


def outpaint(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """Generate the right third of a true clip, whose left two thirds are given."""
    truth = clips(count, suits=in_sight)
    videos = _run(
        pipeline,
        [tasks.outpaint(pipeline, r, c.frames_THWC[:, :, :32], corner=(0, 0)) for r, c in _pairs(truth)],
        options,
    )
    return _checked(videos, truth)


def permanence(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """Videos of an object that goes behind a wall: it comes back in its colour."""
    truth = clips(count, suits=lambda motion: motion.startswith("hide"))
    return _checked(pipeline.generate(requests(truth), **options), truth)


def physics(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """Videos of a bouncing object: the deviation of its speed in mean speeds, beside that of true clips."""
    truth = clips(count, suits=lambda motion: motion == "bounce")
    videos = pipeline.generate(requests(truth), **options)
    unevenness = lambda frames: [u for f in frames for o in observe(f) if (u := bounce(o)) is not None]
    spread, spread_true = unevenness(videos), unevenness([c.frames_THWC for c in truth])
    more = {"bounces_seen": len(spread), "speed_spread": round(float(np.median(spread)), 3),
            "speed_spread_true": round(float(np.median(spread_true)), 3)}  # fmt: skip
    return _checked(videos, truth, **more)


def twice_as_long(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """Videos of 33 frames; training clips have at most 17."""
    truth = clips(count, (33, *SIZE[1:]))
    videos = _run(pipeline, [tasks.text_to_video(pipeline, r) for r in requests(truth)], options)
    return _checked(videos, truth)


def twice_as_long_by_windows(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """Videos of 33 frames, window by window, as long videos are made."""
    truth = clips(count, (33, *SIZE[1:]))
    videos = _run(pipeline, [tasks.long_video(pipeline, r, 33) for r in requests(truth)], options)
    return _checked(videos, truth)


def twice_as_large(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """Videos of 128 x 128 pixels; training clips have at most 64 x 64."""
    truth = clips(count, (17, 128, 128))
    videos = _run(pipeline, [tasks.text_to_video(pipeline, r) for r in requests(truth)], options)
    return _checked(videos, truth)


def _pairs(truth: Sequence[Clip]) -> list[tuple[Request, Clip]]:
    return list(zip(requests(truth), truth))


def _run(pipeline: VideoPipeline, work: Sequence[Task], options: dict) -> list[np.ndarray]:
    return run_tasks(pipeline, work, **options)


TASKS: dict[str, Callable[[VideoPipeline, int, dict], Measured]] = {
    "text-to-video": text_to_video,
    "text-to-image": text_to_image,
    "image-to-video": image_to_video,
    "interpolate": interpolate,
    "extend-forward": extend_forward,
    "extend-backward": extend_backward,
    "loop": loop,
    "transition": transition,
    "transition-strangers": transition_strangers,
    "video-to-video": video_to_video,
    "inpaint": inpaint,
    "outpaint": outpaint,
    "permanence": permanence,
    "physics": physics,
    "twice-as-long": twice_as_long,
    "twice-as-long-by-windows": twice_as_long_by_windows,
    "twice-as-large": twice_as_large,
}
