"""Each verb on held-out captions of the procedural world, with a number that says whether it worked.

    animate     the first frame of a true clip, and its caption   colour, shape and motion, as the checker reads them
    extend      half of a true clip                               does the whole show what the caption says?
    connect     both ends of a true clip                          the largest step of what is made, in median steps
    loop        words                                             the step from the last frame to the first
    ...         `VERBS` has them all

A measurement takes (generator, count, options) and gives (scores, rows for a contact sheet). Options are those of
`Generator.sample`.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from minisora_jax.evaluation.frames import bounce, flicker, psnr, seam
from minisora_jax.generate import tasks
from minisora_jax.generate.frame_ops import FEATHER, largest_step, steps
from minisora_jax.generate.pipeline import VideoPipeline
from minisora_jax.generate.request import Request
from minisora_jax.generate.runner import Task, run_tasks
from minisora_jax.toy.checker import check_all, observe
from minisora_jax.toy.shapes import FPS, Shapes, parse_caption
from minisora_jax.types import Clip, ClipSequence

SIZE = (17, 48, 48)
OFFSET = 20_000  # of the held-out clips measured on: no others are drawn from there
Rows = list[tuple[np.ndarray, str]]
Measured = tuple[dict, Rows]


def clips(count: int, size_THW=SIZE, suits: Callable[[str], bool] = lambda motion: True) -> list[Clip]:
    """Held-out clips of that size whose first object's motion suits."""
    return [clip for clip, _ in zip(_suiting(size_THW, suits), range(count))]


def _suiting(size_THW, suits) -> Iterator[Clip]:
    world = Shapes("heldout", 10**7, offset=OFFSET, size_THW=size_THW)
    for i in range(len(world)):
        clip = world[i]
        if len(clip.frames_THWC) == size_THW[0] and suits(parse_caption(clip.caption)[0][0].motion):
            yield clip


def in_sight(motion: str) -> bool:
    """Nothing goes behind a wall."""
    return not motion.startswith("hide")


def requests(of: ClipSequence, size_THW=None) -> list[Request]:
    return [Request(c.caption, size_THW or c.size_THW, seed=i, fps=FPS) for i, c in enumerate(of)]


def attributes(videos: Sequence[np.ndarray], captions: Sequence[str]) -> tuple[dict, list[str]]:
    """({"colour": share, ...}, what is wrong with each)."""
    hits, by_motion, wrong = check_all(videos, captions)
    kinds = {k: [_mean(v), len(v)] for k, v in by_motion.items()}
    return {k: _mean(v) for k, v in hits.items()} | {"motion_by_kind": kinds}, wrong


def _mean(values) -> float:
    return round(float(np.mean(values)), 4) if len(values) else float("nan")


def _share(values, most: float) -> float:
    return _mean([v <= most for v in values])


def _rows(videos, captions, notes=None) -> Rows:
    notes = notes or [""] * len(videos)
    return [(v, c + (f"   {n}" if n else "")) for v, c, n in zip(videos, captions, notes)]


def _judged(videos, captions, **more) -> Measured:
    scores, wrong = attributes(videos, captions)
    return scores | more, _rows(videos, captions, [f"WRONG: {w}" if w else "" for w in wrong])


# ---- Measurements


def text_to_video(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """Colour, shape, motion; flicker against that of true clips."""
    truth = clips(count)
    videos = pipeline.generate(requests(truth), **options)
    more = {
        "flicker": _mean([flicker(v) for v in videos]),
        "flicker_true": _mean([flicker(c.frames_THWC) for c in truth]),
    }
    return _judged(videos, [c.caption for c in truth], **more)


def text_to_image(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    truth = clips(count, (1, 64, 64))
    return _judged(pipeline.generate(requests(truth), **options), [c.caption for c in truth])


def image_to_video(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """The first frame of a true clip moves as its caption says, and keeps its colour and shape."""
    truth = clips(count, suits=in_sight)
    made = _run(pipeline, [tasks.image_to_video(pipeline, r, c.frames_THWC[0]) for r, c in _pairs(truth)], options)
    kept = [psnr(v[0], c.frames_THWC[0]) for v, c in zip(made, truth)]
    return _judged(made, [c.caption for c in truth], first_frame_psnr=_mean(kept))


def interpolate(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """From the first frame of a true clip to its last."""
    truth = clips(count, suits=lambda motion: not motion.startswith(("hide", "pan")))
    made = _run(
        pipeline,
        [tasks.interpolate(pipeline, r, c.frames_THWC[0], c.frames_THWC[-1]) for r, c in _pairs(truth)],
        options,
    )
    ends = {
        "first_frame_psnr": _mean([psnr(v[0], c.frames_THWC[0]) for v, c in zip(made, truth)]),
        "last_frame_psnr": _mean([psnr(v[-1], c.frames_THWC[-1]) for v, c in zip(made, truth)]),
    }
    scores, rows = _judged(made, [c.caption for c in truth], **ends)
    return {k: v for k, v in scores.items() if not k.startswith("motion")}, rows


def extend_forward(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    return _extend(pipeline, count, options, known=slice(None, 9), ends={"after": 8})


def extend_backward(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    return _extend(pipeline, count, options, known=slice(8, None), ends={"before": 8})


def _extend(pipeline: VideoPipeline, count: int, options: dict, known: slice, ends: dict) -> Measured:
    """Half of a true clip is given; the whole is judged, and the step at which given and made meet.

    "seam_psnr" is of the known frame at the seam against the input, "codec_psnr" what the codec alone makes of it.
    """
    truth = clips(count, suits=in_sight)
    given = [c.frames_THWC[known] for c in truth]
    made = _run(pipeline, [tasks.extend(pipeline, r, g, **ends) for (r, _), g in zip(_pairs(truth), given)], options)
    at = 8 if "after" in ends else 7
    beside = -1 if "after" in ends else 0
    coded = pipeline.decode(pipeline.encode(given))
    more = {
        "known_psnr": _mean([psnr(v[known], g) for v, g in zip(made, given)]),
        "seam_psnr": _mean([psnr(v[known][beside], g[beside]) for v, g in zip(made, given)]),
        "seam_psnr_at_least_30": _mean([psnr(v[known][beside], g[beside]) >= 30 for v, g in zip(made, given)]),
        "codec_psnr": _mean([psnr(z[beside], g[beside]) for z, g in zip(coded, given)]),
        "seam_steps": _mean([largest_step(v, slice(at, at + 1)) for v in made]),
        "seam_at_most_2": _share([largest_step(v, slice(at, at + 1)) for v in made], 2.0),
        "true_seam_at_most_2": _share([largest_step(c.frames_THWC, slice(at, at + 1)) for c in truth], 2.0),
    }
    return _judged(made, [c.caption for c in truth], **more)


def loop(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """The step from the last frame to the first, in median steps; and, two frames on, where the last latent frame meets
    the first ("joint"), beside where the first meets the second ("other_joint")."""
    truth = clips(count, suits=in_sight)
    asked = [dataclasses.replace(r, size_THW=(16, *SIZE[1:]), loop=True) for r in requests(truth)]
    made = pipeline.generate(asked, **options)
    plain = pipeline.generate([dataclasses.replace(r, size_THW=SIZE, loop=False) for r in asked], **options)
    seams = [seam(v) for v in made]
    scores, _ = attributes(made, [c.caption for c in truth])
    by_motion = collections.defaultdict(list)
    for clip, s in zip(truth, seams):
        by_motion[parse_caption(clip.caption)[0][0].motion].append(s <= 1.5)
    more = {
        "seam_median": round(float(np.median(seams)), 3),
        "seam_at_most_1.5": _share(seams, 1.5),
        "joint_at_most_1.5": _share([seam(np.roll(v, 2, axis=0)) for v in made], 1.5),
        "other_joint_at_most_1.5": _share([seam(np.roll(v, -2, axis=0)) for v in made], 1.5),
        "seam_at_most_1.5_by_motion": {k: [_mean(v), len(v)] for k, v in sorted(by_motion.items())},
        "without_loop_at_most_1.5": _share([seam(v[:-1]) for v in plain], 1.5),
        "still_videos": _mean([np.median(steps(v)) < 0.2 for v in made]),
    }
    rows = _rows([np.concatenate([v, v]) for v in made], [c.caption for c in truth], [f"seam {s:.2f}" for s in seams])
    return {k: v for k, v in scores.items() if k in ("colour", "shape", "motion")} | more, rows


def transition(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """Both ends of a true clip, 5 frames each, and the 7 frames between them made."""
    truth = clips(count, suits=in_sight)
    ends = [(c.frames_THWC[:5], c.frames_THWC[12:]) for c in truth]
    made = _run(
        pipeline,
        [tasks.transition(pipeline, r, a, b, between=7) for (r, _), (a, b) in zip(_pairs(truth), ends)],
        options,
    )
    largest = [largest_step(v, slice(4, 12)) for v in made]
    more = {
        "largest_step": round(float(np.median(largest)), 3),
        "no_step_above_2": _share(largest, 2.0),
        "true_no_step_above_2": _share([largest_step(c.frames_THWC, slice(4, 12)) for c in truth], 2.0),
    }
    return _judged(made, [c.caption for c in truth], **more)


def transition_strangers(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """Two videos made from one caption with other seeds, and a second and a half between them."""
    truth = clips(count, suits=lambda motion: not motion.startswith(("hide", "pan")))
    asked = requests(truth)
    a, b = (
        pipeline.generate([dataclasses.replace(r, seed=r.seed + more) for r in asked], **options) for more in (0, 5000)
    )
    made = _run(pipeline, [tasks.transition(pipeline, r, *ends, between=11) for r, *ends in zip(asked, a, b)], options)
    largest = [largest_step(v, slice(16, 28)) for v in made]
    scores = {"largest_step": round(float(np.median(largest)), 3), "no_step_above_2": _share(largest, 2.0)}
    return scores, _rows([v[8:36] for v in made], [c.caption for c in truth], [f"{n:.2f} steps" for n in largest])


def video_to_video(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """Another colour is asked of a true clip: that colour, and the shape and motion that it had."""
    truth = clips(count, suits=in_sight)
    wanted = [c.caption.replace(o := parse_caption(c.caption)[0][0].colour, RECOLOURED[o], 1) for c in truth]
    asked = [dataclasses.replace(r, prompt=w) for (r, _), w in zip(_pairs(truth), wanted)]
    single = [i for i, c in enumerate(truth) if len(parse_caption(c.caption)[0]) == 1]
    made = _run(
        pipeline, [tasks.video_to_video(pipeline, asked[i], truth[i].frames_THWC, STRENGTH) for i in single], options
    )
    return _judged(made, [wanted[i] for i in single], strength=STRENGTH)


STRENGTH = 0.85
RECOLOURED = {"red": "green", "green": "blue", "blue": "orange", "yellow": "magenta", "cyan": "red", "magenta": "cyan",
              "orange": "white", "white": "yellow"}  # fmt: skip


def inpaint(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """The middle half of each frame of a true clip is made anew, by its caption."""
    truth = clips(count, suits=in_sight)
    mask = np.zeros(SIZE[1:], bool)
    mask[:, 16:] = True
    made = _run(pipeline, [tasks.inpaint(pipeline, r, c.frames_THWC, mask) for r, c in _pairs(truth)], options)
    away = [psnr(v[:, :, : 16 - FEATHER], c.frames_THWC[:, :, : 16 - FEATHER]) for v, c in zip(made, truth)]
    return _judged(made, [c.caption for c in truth], kept_psnr=_mean(away))


def outpaint(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """A true clip's left two thirds are given."""
    truth = clips(count, suits=in_sight)
    made = _run(
        pipeline,
        [tasks.outpaint(pipeline, r, c.frames_THWC[:, :, :32], at=(0, 0)) for r, c in _pairs(truth)],
        options,
    )
    return _judged(made, [c.caption for c in truth])


def permanence(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """What goes behind a wall comes back in its colour."""
    truth = clips(count, suits=lambda motion: motion.startswith("hide"))
    return _judged(pipeline.generate(requests(truth), **options), [c.caption for c in truth])


def physics(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """What bounces keeps its speed: its spread in mean speeds, beside that of true clips."""
    truth = clips(count, suits=lambda motion: motion == "bounce")
    videos = pipeline.generate(requests(truth), **options)
    unevenness = lambda frames: [u for f in frames for o in observe(f) if (u := bounce(o)) is not None]
    ours, theirs = unevenness(videos), unevenness([c.frames_THWC for c in truth])
    more = {"bounces_seen": len(ours), "speed_spread": round(float(np.median(ours)), 3),
            "speed_spread_true": round(float(np.median(theirs)), 3)}  # fmt: skip
    return _judged(videos, [c.caption for c in truth], **more)


def twice_as_long(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """33 frames, where training saw at most 17."""
    truth = clips(count, (33, *SIZE[1:]))
    made = _run(pipeline, [tasks.text_to_video(pipeline, r) for r in requests(truth)], options)
    return _judged(made, [c.caption for c in truth])


def twice_as_long_by_windows(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """33 frames, each window from the end of the one before, as a minute is made."""
    truth = clips(count, (33, *SIZE[1:]))
    made = _run(pipeline, [tasks.long_video(pipeline, r, 33) for r in requests(truth)], options)
    return _judged(made, [c.caption for c in truth])


def twice_as_large(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """128 x 128, where training saw at most 64 x 64."""
    truth = clips(count, (17, 128, 128))
    made = _run(pipeline, [tasks.text_to_video(pipeline, r) for r in requests(truth)], options)
    return _judged(made, [c.caption for c in truth])


def _pairs(truth: ClipSequence) -> list[tuple[Request, Clip]]:
    return list(zip(requests(truth), truth))


def _run(pipeline: VideoPipeline, asked: Sequence[Task], options: dict) -> list[np.ndarray]:
    return run_tasks(pipeline, asked, **options)


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
