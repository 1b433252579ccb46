"""A job: one video asked for in words, paths and numbers, as in a line of a batch file, a form or a command.

{"prompt": "a red circle moves left"}                                     text to video
{"prompt": "...", "frames": 1, "size": [512, 512]}                        an image
{"prompt": "...", "image": "cat.png"}                                     image to video
{"prompt": "...", "image": "a.png", "last": "b.png"}                      from one image to another
{"prompt": "...", "video": "cat.mp4", "strength": 0.6}                    video to video
{"prompt": "...", "video": "cat.mp4", "mask": "mask.png"}                 inpaint where the mask is white
{"prompt": "...", "video": "cat.mp4", "size": [480, 832]}                 outpaint: a larger frame around it
{"prompt": "...", "video": "cat.mp4", "extend": "forward", "seconds": 2}  or "backward", or "both"
{"prompt": "...", "video": "cat.mp4", "transition": "dog.mp4"}            a transition between them
{"prompt": "...", "loop": true}                                           a seamless loop; with "video", of that
{"prompt": "a red circle grows [4s] it moves left", "seconds": 60}        a long video, whose prompt changes
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np

from minisora_jax.generate import tasks
from minisora_jax.generate.pipeline import VideoPipeline
from minisora_jax.generate.request import Request
from minisora_jax.generate.runner import Task, altered
from minisora_jax.io.resize import resized
from minisora_jax.io.video import read_clip_frames

log = logging.getLogger("minisora")
MOST_SECONDS = 60.0
SIDES = ("forward", "backward", "both")
INPUTS = ("image", "last", "video", "mask", "transition")  # fields that name a file
_RENAMED = {"connect": "transition"}  # names of fields before 0.2


@dataclasses.dataclass(frozen=True)
class Job:
    prompt: str = ""
    negative: str = ""
    size: tuple[int, int] | None = None  # height, width; None: the input's, or 48x48
    frames: int | None = None  # 1 + 4k, 4k of a loop; None: the input's, or 17
    seconds: float | None = None  # of a long video, of what is added to one, or between two
    fps: float | None = None  # None: the input's, or 8
    seed: int = 0
    image: str | None = None
    last: str | None = None
    video: str | None = None
    strength: float | None = None
    mask: str | None = None
    extend: str | None = None
    transition: str | None = None
    loop: bool = False

    def __post_init__(self):
        if self.size is not None:
            object.__setattr__(self, "size", tuple(int(n) for n in self.size))
        self.task  # noqa: B018 (raises where fields do not go together)
        if not self.prompt.strip():
            raise ValueError("the prompt is empty; say what the video shows")
        if self.seconds is not None and not 0 < self.seconds <= MOST_SECONDS:
            raise ValueError(f"seconds={self.seconds:g} must be above 0 and at most {MOST_SECONDS:g}")
        if self.fps is not None and not 0 < self.fps <= 120:
            raise ValueError(f"fps={self.fps:g} must be above 0 and at most 120")

    @classmethod
    def from_dict(cls, values: dict) -> Job:
        """The job in a line of a batch file. Raises ValueError, which names what it does not know."""
        if not isinstance(values, dict):
            raise ValueError(f'a job is an object, such as {{"prompt": "..."}}, and not {values!r}')
        values = {_RENAMED.get(name, name): value for name, value in values.items()}
        names = [f.name for f in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(names)):
            raise ValueError(f"a job has no {', '.join(unknown)}; it has {', '.join(names)}")
        return cls(**values)

    def to_dict(self) -> dict:
        """The fields that differ from the defaults, as in a line of a batch file."""
        return {f.name: v for f in dataclasses.fields(self) if (v := getattr(self, f.name)) != f.default}

    @property
    def task(self) -> str:
        """The name of the task in generate/tasks.py. Raises ValueError if the fields fit several tasks or none."""
        fits = {
            "image_to_video": self.image and not self.last,
            "interpolate": self.image and self.last,
            "video_to_video": self.video and self.strength is not None,
            "inpaint": self.video and self.mask,
            "extend": self.video and self.extend,
            "transition": self.video and self.transition,
            "loop": self.video and self.loop,
        }
        names = [name for name, fit in fits.items() if fit]
        if len(names) > 1 or (self.image and self.video):
            both = " and ".join(names) if len(names) > 1 else "an image and a video"
            raise ValueError(f"{both} do not go together: ask for one task at a time")
        for name, needs in (("last", "image"), ("strength", "video"), ("mask", "video"), ("extend", "video"),
                            ("transition", "video")):  # fmt: skip
            if getattr(self, name) is not None and not getattr(self, needs):
                raise ValueError(f"{name}={getattr(self, name)!r} needs {needs}")
        if self.extend is not None and self.extend not in SIDES:
            raise ValueError(f"extend={self.extend!r} must be one of {', '.join(SIDES)}")
        if names:
            return names[0]
        if self.video:
            if not self.size:
                raise ValueError(
                    "video: say what to do with it: strength, mask, extend, transition, loop or a larger size"
                )
            return "outpaint"
        return "long_video" if self.seconds is not None and not self.loop else "text_to_video"

    @property
    def inputs(self) -> list[str]:
        """The files that it reads."""
        return [path for name in INPUTS if (path := getattr(self, name))]


def start(pipeline: VideoPipeline, job: Job) -> tuple[Task, float]:
    """(the verb at work, frames per second of its result). Reads the job's files; ValueError says what is wrong.

    A size that is not of whole cells of the model, such as 1080x1920 of 16 pixels, is made a little larger, and cut.
    """
    if not job.size:
        return _START[job.task](pipeline, job)
    if min(job.size) < pipeline.cell:
        H, W = job.size
        raise ValueError(f"size={H}x{W}: this model makes {pipeline.cell} pixels a side and more")
    whole = tuple(-(-n // pipeline.cell) * pipeline.cell for n in job.size)
    task, fps = _START[job.task](pipeline, dataclasses.replace(job, size=whole))
    return altered(task, lambda frames: None if frames is None else _middle(frames, job.size)), fps


def _text_to_video(pipeline: VideoPipeline, job: Job):
    if job.seconds is not None:  # a loop
        job = dataclasses.replace(job, frames=on_grid(pipeline, job.seconds * (job.fps or 8.0), loop=True))
    request = _request(job, job.frames or (16 if job.loop else 17), job.size or (48, 48), job.fps or 8.0)
    pipeline.grid(request)
    return tasks.text_to_video(pipeline, request), request.fps


def _long_video(pipeline: VideoPipeline, job: Job):
    fps = job.fps or 8.0
    prompts = tasks.storyboard(job.prompt, fps)
    request = _request(dataclasses.replace(job, prompt=prompts[0][1]), 1, job.size or (48, 48), fps)
    pipeline.grid(request)
    return tasks.long_video(pipeline, request, max(round(job.seconds * fps), 1), prompts), fps


def _image_to_video(pipeline: VideoPipeline, job: Job):
    image = _image(pipeline, job.image, job.size)
    request = _request(job, _frames(pipeline, job, 17), image.shape[:2], job.fps or 8.0)
    pipeline.grid(request)
    if job.seconds is not None and request.size_THW[0] > pipeline.window_frames:
        prompts = tasks.storyboard(job.prompt, request.fps)
        return tasks.long_video(pipeline, request, request.size_THW[0], prompts, image), request.fps
    return tasks.image_to_video(pipeline, request, image), request.fps


def _interpolate(pipeline: VideoPipeline, job: Job):
    first = _image(pipeline, job.image, job.size)
    last = _image(pipeline, job.last, first.shape[:2])
    request = _request(job, _frames(pipeline, job, 17), first.shape[:2], job.fps or 8.0)
    return tasks.interpolate(pipeline, request, first, last), request.fps


def _video_to_video(pipeline: VideoPipeline, job: Job):
    frames, fps = _video(pipeline, job, job.size, whole=True)
    return tasks.video_to_video(pipeline, _request(job, len(frames), frames.shape[1:3], fps), frames, job.strength), fps


def _inpaint(pipeline: VideoPipeline, job: Job):
    frames, fps = _video(pipeline, job, job.size, whole=True)
    marks, _ = read_clip_frames(job.mask, max_frames=len(frames))
    if len(marks) not in (1, len(frames)):
        raise ValueError(f"the mask {job.mask} has {len(marks)} frames, the video {len(frames)}: give one, or as many")
    mask = resized(marks, frames.shape[1:3]).mean(-1) > 127
    return tasks.inpaint(pipeline, _request(job, len(frames), frames.shape[1:3], fps), frames, mask), fps


def _outpaint(pipeline: VideoPipeline, job: Job):
    frames, fps = _video(pipeline, job, None, whole=True)
    return tasks.outpaint(pipeline, _request(job, len(frames), job.size, fps), frames), fps


def _extend(pipeline: VideoPipeline, job: Job):
    frames, fps = _video(pipeline, job, job.size)
    more = max(1, round((job.seconds or 1.0) * fps))
    request = _request(job, 1, frames.shape[1:3], fps)
    ends = {"before": more if job.extend != "forward" else 0, "after": more if job.extend != "backward" else 0}
    return tasks.extend(pipeline, request, frames, **ends), fps


def _transition(pipeline: VideoPipeline, job: Job):
    a, fps = _video(pipeline, job, job.size)
    b = a if job.loop else _fitted(pipeline, read_clip_frames(job.transition)[0], a.shape[1:3])
    between = max(1, round((job.seconds or 1.5) * fps))
    return tasks.transition(pipeline, _request(job, 1, a.shape[1:3], fps), a, b, between=between, loop=job.loop), fps


_START = {
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


# ---- What jobs read


def _request(job: Job, frames: int, size_HW: tuple[int, int], fps: float) -> Request:
    fps = job.fps or fps
    return Request(job.prompt, (frames, *size_HW), job.seed, fps, job.negative, loop=job.loop and not job.video)


def _frames(pipeline, job: Job, default: int) -> int:
    if job.seconds is not None:
        return on_grid(pipeline, job.seconds * (job.fps or 8.0))
    return job.frames or default


def on_grid(pipeline, frames: float, loop: bool = False) -> int:
    """The codec's next number of frames: 1 + 4k, or 4k of a loop."""
    factor = pipeline.codec.config.time_factor
    return max(1, round(frames / factor)) * factor + (0 if loop else 1)


def _image(pipeline, path: str, size_HW: tuple[int, int] | None) -> np.ndarray:
    frames, _ = read_clip_frames(path, max_frames=1)
    return _fitted(pipeline, frames, size_HW)[0]


def _video(pipeline, job: Job, size_HW, whole: bool = False) -> tuple[np.ndarray, float]:
    """(frames in whole cells, their rate or the one asked for). whole: job.frames, cut to 1 + 4k at the end."""
    found, fps = read_clip_frames(job.video, max_frames=job.frames if whole else None)
    if whole:
        found = found[: 1 + (len(found) - 1) // pipeline.codec.config.time_factor * pipeline.codec.config.time_factor]
    fitted, most = _fitted(pipeline, found, size_HW), pipeline.known_size
    size = job.size or fitted.shape[1:3]
    if most and any(n > m for n, m in zip(size, most[1:])):
        log.warning(
            "%s: %dx%d is more than the %dx%d that training knew, and what is made of a given video is not enlarged "
            "from there: expect little of it, or give --size %dx%d",
            job.video, *size, *most[1:], *most[1:],
        )  # fmt: skip
    return fitted, job.fps or fps


def _fitted(pipeline, frames_THWC: np.ndarray, size_HW: tuple[int, int] | None) -> np.ndarray:
    """Scaled to cover that size and cut to it at the middle; without one, cut to whole cells."""
    H, W = frames_THWC.shape[1:3]
    cell = pipeline.cell
    if size_HW is None:
        size_HW = (H // cell * cell, W // cell * cell)
        if not all(size_HW):
            raise ValueError(f"{H}x{W} pixels are fewer than one cell of the model, {cell}x{cell}: give a size")
    else:
        scale = max(size_HW[0] / H, size_HW[1] / W)
        scaled = (max(size_HW[0], round(H * scale)), max(size_HW[1], round(W * scale)))
        if scaled != (H, W):
            frames_THWC = resized(frames_THWC, scaled)
        H, W = scaled
    return _middle(frames_THWC, size_HW)


def _middle(frames_THWC: np.ndarray, size_HW: tuple[int, int]) -> np.ndarray:
    """Frames without what is more than that size."""
    y, x = ((n - wanted) // 2 for n, wanted in zip(frames_THWC.shape[1:3], size_HW))
    return np.ascontiguousarray(frames_THWC[:, y : y + size_HW[0], x : x + size_HW[1]])


def name_of(job: Job) -> str:
    """A file's name, without its suffix: the first words of the prompt, and the seed."""
    words = "-".join("".join(c if c.isalnum() else " " for c in job.prompt).split())[:60]
    return f"{words}-{job.seed}"


def exists(job: Job) -> None:
    """FileNotFoundError for an input that is not there."""
    for path in job.inputs:
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} does not exist")
