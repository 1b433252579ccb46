"""From a job to a running task: reads the job's files, brings them to one size, and chooses frames and rates."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable

import numpy as np

from minisora_jax.generate import tasks
from minisora_jax.generate.given_frames import require_able
from minisora_jax.generate.pipeline import VideoPipeline
from minisora_jax.generate.request import Request
from minisora_jax.generate.runner import Task, altered
from minisora_jax.generate.storyboard import lines, storyboard
from minisora_jax.io.filesystem import printable
from minisora_jax.io.progress import Progress
from minisora_jax.jobs.job import Job
from minisora_jax.jobs.room import require_room
from minisora_jax.media.video import collected, open_video, probe

log = logging.getLogger("minisora")

DEFAULT_SIZE, DEFAULT_FRAMES, DEFAULT_LOOP_FRAMES, DEFAULT_FPS = (48, 48), 17, 16, 8.0
COUNTED, TIMED = ("video_to_video", "inpaint", "outpaint"), ("extend", "transition", "loop")  # by frames, by seconds
Started = tuple[Task, float]  # and the frames per second of its result


def start(pipeline: VideoPipeline, job: Job) -> Started:
    """(the task of a job, frames per second of its result).

    A size that is not whole cells, such as 1080x1920 with cells of 16 pixels, is made a little larger and cropped.

    Raises:
        ValueError: if the model or the job's files cannot do it; the message says what can be done.
        OSError: if a file cannot be read.
    """
    require_able(pipeline.config, job.task)
    if "[" in job.prompt:
        _check_times(job)
    used, unused = ("frames", "seconds") if job.task in COUNTED else ("seconds", "frames")
    if getattr(job, unused) is not None and (job.seconds is not None or job.task in TIMED):
        log.warning("%s=%g is not used: the length of this task is given in %s", unused, getattr(job, unused), used)
    if not job.size:
        return _STARTS[job.task](pipeline, job)
    size_HW = job.size
    if min(size_HW) < pipeline.cell:
        raise ValueError(f"size={size_HW[0]}x{size_HW[1]}: this model makes {pipeline.cell} pixels a side and more")
    require_room(pipeline.codec, size_HW, video=job.frames != 1)
    height, width = (-(-n // pipeline.cell) * pipeline.cell for n in size_HW)
    task, fps = _STARTS[job.task](pipeline, dataclasses.replace(job, size=(height, width)))
    return altered(task, lambda frames: None if frames is None else _cropped(frames, size_HW)), fps


def _check_times(job: Job) -> None:
    """ValueError for a prompt with times where none can be kept; a word for a time after the end."""
    starts = [start for start, _, _ in lines(job.prompt)]
    if len(starts) > 1 and job.task not in ("long_video", "image_to_video"):
        raise ValueError(
            f"the prompt changes at {starts[1]:g} s, and only a long video or one from an image can do so: give its "
            f'length by --seconds (in a job "seconds"), or one prompt without times'
        )
    end = job.seconds or (job.frames or DEFAULT_FRAMES) / (job.fps or DEFAULT_FPS)
    if starts[-1] >= end > 0 and len(starts) > 1:
        log.warning("the prompt changes at %g s, and the video ends at %g s: that line is not shown", starts[-1], end)


def on_grid(pipeline: VideoPipeline, frames: float, loop: bool = False) -> int:
    """The codec's nearest number of frames: 1 + 4k, or 4k of a loop."""
    factor = pipeline.codec.config.time_factor
    return max(1, round(frames / factor)) * factor + (0 if loop else 1)


# ---- One function for each task


def _text_to_video(pipeline: VideoPipeline, job: Job) -> Started:
    fps = job.fps or DEFAULT_FPS
    frames = job.frames or (DEFAULT_LOOP_FRAMES if job.loop else DEFAULT_FRAMES)
    if job.seconds is not None:  # a loop
        frames = on_grid(pipeline, job.seconds * fps, loop=True)
    request = _request(job, frames, job.size or DEFAULT_SIZE, fps)
    pipeline.grid(request)
    return tasks.text_to_video(pipeline, request), request.fps


def _long_video(pipeline: VideoPipeline, job: Job) -> Started:
    fps = job.fps or DEFAULT_FPS
    prompts = storyboard(job.prompt, fps)
    request = _request(dataclasses.replace(job, prompt=prompts[0][1]), 1, job.size or DEFAULT_SIZE, fps)
    pipeline.grid(request)
    return tasks.long_video(pipeline, request, max(round((job.seconds or 0) * fps), 1), prompts), fps


def _image_to_video(pipeline: VideoPipeline, job: Job) -> Started:
    image = _image(pipeline, job.image, job.size)
    request = _request(job, _frames(pipeline, job), (image.shape[0], image.shape[1]), DEFAULT_FPS)
    pipeline.grid(request)
    prompts = storyboard(job.prompt, request.fps)
    if len(prompts) > 1 or (job.seconds is not None and request.size_THW[0] > pipeline.window_frames):
        require_able(pipeline.config, "long_video")
        return tasks.long_video(pipeline, request, request.size_THW[0], prompts, image), request.fps
    return tasks.image_to_video(pipeline, request, image), request.fps


def _interpolate(pipeline: VideoPipeline, job: Job) -> Started:
    first = _image(pipeline, job.image, job.size)
    size_HW = (first.shape[0], first.shape[1])
    last = _image(pipeline, job.last, size_HW)
    request = _request(job, _frames(pipeline, job), size_HW, DEFAULT_FPS)
    return tasks.interpolate(pipeline, request, first, last), request.fps


def _video_to_video(pipeline: VideoPipeline, job: Job) -> Started:
    frames, fps = _whole_video(pipeline, job, job.size)
    strength = 1.0 if job.strength is None else job.strength
    return tasks.video_to_video(pipeline, _request_like(job, frames, fps), frames, strength), fps


def _inpaint(pipeline: VideoPipeline, job: Job) -> Started:
    frames, fps = _whole_video(pipeline, job, job.size)
    marks = _mask(pipeline, job, frames.shape[1:3], len(frames), fps)
    if len(marks) not in (1, len(frames)):
        raise ValueError(f"the mask {job.mask} has {len(marks)} frames, the video {len(frames)}: give one, or as many")
    return tasks.inpaint(pipeline, _request_like(job, frames, fps), frames, marks.mean(-1) > 127), fps


def _outpaint(pipeline: VideoPipeline, job: Job) -> Started:
    frames, fps = _whole_video(pipeline, job, None)
    return tasks.outpaint(pipeline, _request(job, len(frames), job.size or DEFAULT_SIZE, fps), frames), fps


def _extend(pipeline: VideoPipeline, job: Job) -> Started:
    frames, fps = _video(pipeline, job, job.size)
    new = max(1, round((job.seconds or 1.0) * fps))
    request = _request(job, 1, (frames.shape[1], frames.shape[2]), fps)
    before, after = (new if job.extend != "forward" else 0), (new if job.extend != "backward" else 0)
    return tasks.extend(pipeline, request, frames, before=before, after=after), fps


def _transition(pipeline: VideoPipeline, job: Job) -> Started:
    first, fps = _video(pipeline, job, job.size)
    size_HW = (first.shape[1], first.shape[2])
    second = first if job.loop else _read(pipeline, str(job.transition), size_HW, fps=fps)[0]
    between = max(1, round((job.seconds or 1.5) * fps))
    request = _request(job, 1, size_HW, fps)
    return tasks.transition(pipeline, request, first, second, between=between, loop=job.loop), fps


_STARTS: dict[str, Callable[[VideoPipeline, Job], Started]] = {
    "text_to_video": _text_to_video,
    "long_video": _long_video,
    "image_to_video": _image_to_video,
    "interpolate": _interpolate,
    "video_to_video": _video_to_video,
    "inpaint": _inpaint,
    "outpaint": _outpaint,
    "extend": _extend,
    "transition": _transition,
    "loop": _transition,
}


# ---- Requests


def _request(job: Job, frames: int, size_HW: tuple[int, int], fps: float) -> Request:
    loop = job.loop and not job.video
    return Request(job.prompt, (frames, *size_HW), job.seed, job.fps or fps, job.negative, loop=loop)


def _request_like(job: Job, frames_THWC: np.ndarray, fps: float) -> Request:
    T, H, W = frames_THWC.shape[:3]
    return _request(job, T, (H, W), fps)


def _frames(pipeline: VideoPipeline, job: Job) -> int:
    if job.seconds is not None:
        return on_grid(pipeline, job.seconds * (job.fps or DEFAULT_FPS))
    return job.frames or DEFAULT_FRAMES


# ---- Files


def _image(pipeline: VideoPipeline, path: str | None, size_HW: tuple[int, int] | None) -> np.ndarray:
    return _read(pipeline, str(path), size_HW, most=1)[0][0]


def _whole_video(pipeline: VideoPipeline, job: Job, size_HW: tuple[int, int] | None) -> tuple[np.ndarray, float]:
    """As `_video`, with at most `job.frames` frames, cut at the end to 1 + 4k, with a word."""
    factor = pipeline.codec.config.time_factor
    if job.frames and (job.frames - 1) % factor:
        pipeline.codec.config.latent_size((job.frames, 0, 0))  # which says what to use
    frames, fps = _video(pipeline, job, size_HW, most=job.frames)
    if extra := (len(frames) - 1) % factor:
        said = "%s: the last %d of %d frames are left out: the codec takes 1 + %d*k"
        log.info(said, job.video, extra, len(frames), factor)
    return frames[: len(frames) - extra], fps


def _video(
    pipeline: VideoPipeline, job: Job, size_HW: tuple[int, int] | None, most: int | None = None
) -> tuple[np.ndarray, float]:
    """(frames in whole cells, at the job's rate or else the file's; that rate)."""
    frames, fps = _read(pipeline, str(job.video), size_HW, most=most, fps=job.fps)
    known = pipeline.known_size
    H, W = job.size or frames.shape[1:3]
    if known and (H > known[1] or W > known[2]):
        log.warning(
            "%s: %dx%d is more than the %dx%d of training, and given videos are not upscaled from a trained size: "
            "expect little of it, or give --size %dx%d",
            job.video, H, W, *known[1:], *known[1:],
        )  # fmt: skip
    return frames, fps


def _mask(pipeline: VideoPipeline, job: Job, size_HW: tuple[int, int], most: int, fps: float) -> np.ndarray:
    """The frames of the mask, brought to the video's size by the same rule as the video, so that it stays in place."""
    video = probe(str(job.video), made=True)
    scaled_HW = _covering(video.height, video.width, job.size) if job.size else (video.height, video.width)
    return _cropped(_read(pipeline, str(job.mask), scaled_HW, most=most, fps=fps)[0], size_HW)


def _read(
    pipeline: VideoPipeline,
    path: str,
    size_HW: tuple[int, int] | None,
    *,
    most: int | None = None,
    fps: float | None = None,
) -> tuple[np.ndarray, float]:
    """(the first frames of a file, at most `most`; their rate), the file's frames shown at `fps`, or at its own rate.

    Frames are scaled to cover the size and cropped to it in the middle, one by one as they are decoded. Without a size
    they are cropped to whole cells.
    """
    with open_video(path, made=True) as video:
        info, cell = video.info, pipeline.cell
        for remark in info.remarks:
            log.info("%s: %s", path, remark)
        if size_HW is None and min(info.height, info.width) < cell:
            raise ValueError(
                f"{path}: {info.height}x{info.width} pixels are fewer than one cell of the model, {cell}x{cell}: "
                f"give a size"
            )
        fit = None if size_HW is None else lambda H, W: _covering(H, W, size_HW)
        crop_HW = size_HW or (info.height // cell * cell, info.width // cell * cell)
        require_room(pipeline.codec, crop_HW, video=True)
        rate = None if video.still else fps
        if rate and not math.isclose(rate, info.fps, rel_tol=1e-3):
            log.info("%s: shown at %g frames per second, which is %g in the file", path, rate, info.fps)
        frames = (_cropped(frame[None], crop_HW)[0] for frame in video.frames(fps=rate, fit=fit))
        count = video.count(rate) if most is None else min(most, video.count(rate))
        bar = Progress(frames, f"reading {printable(path)}", count, unit="frame", disable=None, delay=2, leave=False)
        return collected(iter(bar), count, path), rate or fps or info.fps


def _covering(H: int, W: int, size_HW: tuple[int, int]) -> tuple[int, int]:
    """The smallest height and width that cover the size, at the aspect ratio of H and W."""
    scale = max(size_HW[0] / H, size_HW[1] / W)
    return max(size_HW[0], round(H * scale)), max(size_HW[1], round(W * scale))


def _cropped(frames_THWC: np.ndarray, size_HW: tuple[int, int]) -> np.ndarray:
    """The middle of the frames."""
    y, x = ((n - size) // 2 for n, size in zip(frames_THWC.shape[1:3], size_HW))
    return np.ascontiguousarray(frames_THWC[:, y : y + size_HW[0], x : x + size_HW[1]])
