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

import dataclasses
from collections.abc import Callable

import numpy as np

from minisora_jax.evaluation.frames import bounce, flicker, psnr
from minisora_jax.evaluation.heldout import (
    SIZE,
    Measured,
    beside_a_still_camera,
    checked,
    clips,
    in_sight,
    mean,
    pairs,
    requests,
    run,
    share,
)
from minisora_jax.evaluation.transitions import loop, transition, transition_strangers, transition_true
from minisora_jax.generate import tasks
from minisora_jax.generate.frame_ops import FEATHER, largest_step
from minisora_jax.generate.pipeline import VideoPipeline
from minisora_jax.toy.checker import observe
from minisora_jax.toy.grammar import parse_caption


def text_to_video(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """Videos from captions: colour, shape and motion; and flicker, beside that of true clips."""
    truth = clips(count)
    videos = pipeline.generate(requests(truth), **options)
    more = {
        "flicker": mean([flicker(v) for v in videos]),
        "flicker_true": mean([flicker(c.frames_THWC) for c in truth]),
    }
    return checked(videos, truth, **more)


def text_to_image(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """Images of 64 x 64 pixels from captions: colour and shape."""
    truth = clips(count, (1, 64, 64))
    return checked(pipeline.generate(requests(truth), **options), truth)


def image_to_video(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """Videos that begin with the first frame of a true clip: colour, shape, motion, and the PSNR of the first frame."""
    truth = clips(count, suits=in_sight)
    videos = run(pipeline, [tasks.image_to_video(pipeline, r, c.frames_THWC[0]) for r, c in pairs(truth)], options)
    kept = [psnr(v[0], c.frames_THWC[0]) for v, c in zip(videos, truth)]
    return checked(videos, truth, first_frame_psnr=mean(kept))


def interpolate(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """Videos from the first frame of a true clip to its last: colour, shape, and the PSNR of both frames."""
    truth = clips(count, suits=beside_a_still_camera)
    videos = run(
        pipeline,
        [tasks.interpolate(pipeline, r, c.frames_THWC[0], c.frames_THWC[-1]) for r, c in pairs(truth)],
        options,
    )
    ends = {
        "first_frame_psnr": mean([psnr(v[0], c.frames_THWC[0]) for v, c in zip(videos, truth)]),
        "last_frame_psnr": mean([psnr(v[-1], c.frames_THWC[-1]) for v, c in zip(videos, truth)]),
    }
    scores, rows = checked(videos, truth, **ends)
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
    videos = run(pipeline, [tasks.extend(pipeline, r, x, **new) for (r, _), x in zip(pairs(truth), inputs)], options)
    at = 8 if "after" in new else 7
    beside = -1 if "after" in new else 0
    coded = pipeline.decode(pipeline.encode(inputs))
    more = {
        "known_psnr": mean([psnr(v[given], x) for v, x in zip(videos, inputs)]),
        "seam_psnr": mean([psnr(v[given][beside], x[beside]) for v, x in zip(videos, inputs)]),
        "seam_psnr_at_least_30": mean([psnr(v[given][beside], x[beside]) >= 30 for v, x in zip(videos, inputs)]),
        "codec_psnr": mean([psnr(z[beside], x[beside]) for z, x in zip(coded, inputs)]),
        "seam_steps": mean([largest_step(v, slice(at, at + 1)) for v in videos]),
        "seam_at_most_2": share([largest_step(v, slice(at, at + 1)) for v in videos], 2.0),
        "true_seam_at_most_2": share([largest_step(c.frames_THWC, slice(at, at + 1)) for c in truth], 2.0),
    }
    return checked(videos, truth, **more)


def video_to_video(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """Recolour the object of a true clip: the new colour, and the old shape and motion."""
    truth = clips(count, suits=in_sight)
    recoloured = [c.caption.replace(o := parse_caption(c.caption)[0][0].colour, RECOLOURED[o], 1) for c in truth]
    prompted = [dataclasses.replace(r, prompt=p) for (r, _), p in zip(pairs(truth), recoloured)]
    single = [i for i, c in enumerate(truth) if len(parse_caption(c.caption)[0]) == 1]
    videos = run(
        pipeline, [tasks.video_to_video(pipeline, prompted[i], truth[i].frames_THWC, STRENGTH) for i in single], options
    )
    expected = [dataclasses.replace(truth[i], caption=recoloured[i]) for i in single]
    return checked(videos, expected, strength=STRENGTH)


STRENGTH = 0.85
RECOLOURED = {"red": "green", "green": "blue", "blue": "orange", "yellow": "magenta", "cyan": "red", "magenta": "cyan",
              "orange": "white", "white": "yellow"}  # fmt: skip


def inpaint(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """Generate the pixels right of column 16 of a true clip anew, by its caption; "kept_psnr" is of the others."""
    truth = clips(count, suits=in_sight)
    mask = np.zeros(SIZE[1:], bool)
    mask[:, 16:] = True
    videos = run(pipeline, [tasks.inpaint(pipeline, r, c.frames_THWC, mask) for r, c in pairs(truth)], options)
    away = [psnr(v[:, :, : 16 - FEATHER], c.frames_THWC[:, :, : 16 - FEATHER]) for v, c in zip(videos, truth)]
    return checked(videos, truth, kept_psnr=mean(away))


def outpaint(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """Generate the right third of a true clip, whose left two thirds are given."""
    truth = clips(count, suits=in_sight)
    videos = run(
        pipeline,
        [tasks.outpaint(pipeline, r, c.frames_THWC[:, :, :32], corner=(0, 0)) for r, c in pairs(truth)],
        options,
    )
    return checked(videos, truth)


def permanence(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """Videos of an object that goes behind a wall: it comes back in its colour."""
    truth = clips(count, suits=lambda motion: motion.startswith("hide"))
    return checked(pipeline.generate(requests(truth), **options), truth)


def physics(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """Videos of a bouncing object: the deviation of its speed in mean speeds, beside that of true clips."""
    truth = clips(count, suits=lambda motion: motion == "bounce")
    videos = pipeline.generate(requests(truth), **options)
    unevenness = lambda frames: [u for f in frames for o in observe(f) if (u := bounce(o)) is not None]
    spread, spread_true = unevenness(videos), unevenness([c.frames_THWC for c in truth])
    more = {"bounces_seen": len(spread), "speed_spread": round(float(np.median(spread)), 3),
            "speed_spread_true": round(float(np.median(spread_true)), 3)}  # fmt: skip
    return checked(videos, truth, **more)


def twice_as_long(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """Videos of 33 frames; training clips have at most 17."""
    truth = clips(count, (33, *SIZE[1:]))
    videos = run(pipeline, [tasks.text_to_video(pipeline, r) for r in requests(truth)], options)
    return checked(videos, truth)


def twice_as_long_by_windows(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """Videos of 33 frames, window by window, as long videos are made."""
    truth = clips(count, (33, *SIZE[1:]))
    videos = run(pipeline, [tasks.long_video(pipeline, r, 33) for r in requests(truth)], options)
    return checked(videos, truth)


def twice_as_large(pipeline: VideoPipeline, count: int, options: dict) -> Measured:
    """Videos of 128 x 128 pixels; training clips have at most 64 x 64."""
    truth = clips(count, (17, 128, 128))
    videos = run(pipeline, [tasks.text_to_video(pipeline, r) for r in requests(truth)], options)
    return checked(videos, truth)


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
    "transition-true": transition_true,
    "video-to-video": video_to_video,
    "inpaint": inpaint,
    "outpaint": outpaint,
    "permanence": permanence,
    "physics": physics,
    "twice-as-long": twice_as_long,
    "twice-as-long-by-windows": twice_as_long_by_windows,
    "twice-as-large": twice_as_large,
}
