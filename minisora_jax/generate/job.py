"""A job: one video asked for in words, paths and numbers, as a line of a batch file, a form or a command says it.

{"prompt": "a red circle moves left"}                                     text to video
{"prompt": "...", "frames": 1, "size": [512, 512]}                        an image
{"prompt": "...", "image": "cat.png"}                                     animate it
{"prompt": "...", "image": "a.png", "last": "b.png"}                      from one image to another
{"prompt": "...", "video": "cat.mp4", "strength": 0.6}                    restyle
{"prompt": "...", "video": "cat.mp4", "mask": "mask.png"}                 inpaint where the mask is white
{"prompt": "...", "video": "cat.mp4", "size": [480, 832]}                 outpaint: a larger frame around it
{"prompt": "...", "video": "cat.mp4", "extend": "forward", "seconds": 2}  or "backward", or "both"
{"prompt": "...", "video": "cat.mp4", "connect": "dog.mp4"}               a transition between them
{"prompt": "...", "loop": true}                                           a seamless loop; with "video", of that
{"prompt": "a red circle grows [4s] it moves left", "seconds": 60}        a long video, whose prompt changes
"""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path

import numpy as np

from minisora_jax.generate import tasks
from minisora_jax.generate.request import Request
from minisora_jax.generate.runner import Verb, altered
from minisora_jax.io.resize import resized
from minisora_jax.io.video import read_clip_frames

log = logging.getLogger("minisora")
MOST_SECONDS = 60.0
SIDES = ("forward", "backward", "both")
INPUTS = ("image", "last", "video", "mask", "connect")  # what of a job names a file


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
    connect: str | None = None
    loop: bool = False

    def __post_init__(self):
        if self.size is not None:
            object.__setattr__(self, "size", tuple(int(n) for n in self.size))
        self.verb  # noqa: B018 (says what does not go together)
        if not self.prompt.strip():
            raise ValueError("the prompt is empty; say what the video shows")
        if self.seconds is not None and not 0 < self.seconds <= MOST_SECONDS:
            raise ValueError(f"seconds={self.seconds:g} must be above 0 and at most {MOST_SECONDS:g}")
        if self.fps is not None and not 0 < self.fps <= 120:
            raise ValueError(f"fps={self.fps:g} must be above 0 and at most 120")

    @classmethod
    def of(cls, values: dict) -> Job:
        """Of a line of a batch file; ValueError names what it does not know."""
        if not isinstance(values, dict):
            raise ValueError(f'a job is an object, such as {{"prompt": "..."}}, and not {values!r}')
        names = [f.name for f in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(names)):
            raise ValueError(f"a job has no {', '.join(unknown)}; it has {', '.join(names)}")
        return cls(**values)

    @property
    def said(self) -> dict:
        """What differs from the defaults, as a line of a batch file says it."""
        return {f.name: v for f in dataclasses.fields(self) if (v := getattr(self, f.name)) != f.default}

    @property
    def verb(self) -> str:
        """Which of tasks.py is meant. ValueError where the words for several are said."""
        meant = {
            "animate": self.image and not self.last,
            "join": self.image and self.last,
            "restyle": self.video and self.strength is not None,
            "inpaint": self.video and self.mask,
            "extend": self.video and self.extend,
            "connect": self.video and self.connect,
            "loop": self.video and self.loop,
        }
        found = [name for name, said in meant.items() if said]
        if len(found) > 1 or (self.image and self.video):
            both = " and ".join(found) if len(found) > 1 else "an image and a video"
            raise ValueError(f"{both} do not go together: one thing at a time")
        for name, needs in (("last", "image"), ("strength", "video"), ("mask", "video"), ("extend", "video"),
                            ("connect", "video")):  # fmt: skip
            if getattr(self, name) is not None and not getattr(self, needs):
                raise ValueError(f"{name}={getattr(self, name)!r} needs {needs}")
        if self.extend is not None and self.extend not in SIDES:
            raise ValueError(f"extend={self.extend!r} must be one of {', '.join(SIDES)}")
        if found:
            return found[0]
        if self.video:
            if not self.size:
                raise ValueError(
                    "video: say what to do with it: strength, mask, extend, connect, loop or a larger size"
                )
            return "outpaint"
        return "rollout" if self.seconds is not None and not self.loop else "make"

    @property
    def inputs(self) -> list[str]:
        """The files that it reads."""
        return [path for name in INPUTS if (path := getattr(self, name))]


def start(generator, job: Job) -> tuple[Verb, float]:
    """(the verb at work, frames per second of its result). Reads the job's files; ValueError says what is wrong.

    A size that is not of whole cells of the model, such as 1080x1920 of 16 pixels, is made a little larger, and cut.
    """
    if not job.size:
        return _START[job.verb](generator, job)
    if min(job.size) < generator.cell:
        H, W = job.size
        raise ValueError(f"size={H}x{W}: this model makes {generator.cell} pixels a side and more")
    whole = tuple(-(-n // generator.cell) * generator.cell for n in job.size)
    verb, fps = _START[job.verb](generator, dataclasses.replace(job, size=whole))
    return altered(verb, lambda frames: None if frames is None else _middle(frames, job.size)), fps


def _make(generator, job: Job):
    if job.seconds is not None:  # a loop
        job = dataclasses.replace(job, frames=on_grid(generator, job.seconds * (job.fps or 8.0), loop=True))
    request = _request(job, job.frames or (16 if job.loop else 17), job.size or (48, 48), job.fps or 8.0)
    generator.grid(request)
    return tasks.make(generator, request), request.fps


def _rollout(generator, job: Job):
    fps = job.fps or 8.0
    prompts = _storyboard(job.prompt, fps)
    request = _request(dataclasses.replace(job, prompt=prompts[0][1]), 1, job.size or (48, 48), fps)
    generator.grid(request)
    return tasks.rollout(generator, request, max(round(job.seconds * fps), 1), prompts), fps


def _animate(generator, job: Job):
    image = _image(generator, job.image, job.size)
    request = _request(job, _frames(generator, job, 17), image.shape[:2], job.fps or 8.0)
    generator.grid(request)
    if job.seconds is not None and request.size_THW[0] > generator.window_frames:
        prompts = _storyboard(job.prompt, request.fps)
        return tasks.rollout(generator, request, request.size_THW[0], prompts, image), request.fps
    return tasks.animate(generator, request, image), request.fps


def _join(generator, job: Job):
    first = _image(generator, job.image, job.size)
    last = _image(generator, job.last, first.shape[:2])
    request = _request(job, _frames(generator, job, 17), first.shape[:2], job.fps or 8.0)
    return tasks.join(generator, request, first, last), request.fps


def _restyle(generator, job: Job):
    frames, fps = _video(generator, job, job.size, whole=True)
    return tasks.restyle(generator, _request(job, len(frames), frames.shape[1:3], fps), frames, job.strength), fps


def _inpaint(generator, job: Job):
    frames, fps = _video(generator, job, job.size, whole=True)
    marks, _ = read_clip_frames(job.mask, max_frames=len(frames))
    if len(marks) not in (1, len(frames)):
        raise ValueError(f"the mask {job.mask} has {len(marks)} frames, the video {len(frames)}: give one, or as many")
    mask = resized(marks, frames.shape[1:3]).mean(-1) > 127
    return tasks.inpaint(generator, _request(job, len(frames), frames.shape[1:3], fps), frames, mask), fps


def _outpaint(generator, job: Job):
    frames, fps = _video(generator, job, None, whole=True)
    return tasks.outpaint(generator, _request(job, len(frames), job.size, fps), frames), fps


def _extend(generator, job: Job):
    frames, fps = _video(generator, job, job.size)
    more = max(1, round((job.seconds or 1.0) * fps))
    request = _request(job, 1, frames.shape[1:3], fps)
    ends = {"before": more if job.extend != "forward" else 0, "after": more if job.extend != "backward" else 0}
    return tasks.extend(generator, request, frames, **ends), fps


def _connect(generator, job: Job):
    a, fps = _video(generator, job, job.size)
    b = a if job.loop else _fitted(generator, read_clip_frames(job.connect)[0], a.shape[1:3])
    between = max(1, round((job.seconds or 1.5) * fps))
    return tasks.connect(generator, _request(job, 1, a.shape[1:3], fps), a, b, between=between, loop=job.loop), fps


_START = {
    "make": _make,
    "rollout": _rollout,
    "animate": _animate,
    "join": _join,
    "restyle": _restyle,
    "inpaint": _inpaint,
    "outpaint": _outpaint,
    "extend": _extend,
    "connect": _connect,
    "loop": _connect,
}


# ---- What jobs read


def _storyboard(prompt: str, fps: float) -> list[tuple[int, str]]:
    """(from which frame on, words) of "a red circle grows [4s] it moves up"."""
    pieces = re.split(r"\s*\[\s*([\d.]+)\s*s\s*\]\s*", prompt)
    starts = [0.0, *map(float, pieces[1::2])]
    if starts != sorted(set(starts)):
        raise ValueError(f"the times in the prompt must rise: {', '.join(f'{s:g}s' for s in starts)}")
    return [(round(s * fps), words) for s, words in zip(starts, pieces[::2])]


def _request(job: Job, frames: int, size_HW: tuple[int, int], fps: float) -> Request:
    fps = job.fps or fps
    return Request(job.prompt, (frames, *size_HW), job.seed, fps, job.negative, loop=job.loop and not job.video)


def _frames(generator, job: Job, default: int) -> int:
    if job.seconds is not None:
        return on_grid(generator, job.seconds * (job.fps or 8.0))
    return job.frames or default


def on_grid(generator, frames: float, loop: bool = False) -> int:
    """The codec's next number of frames: 1 + 4k, or 4k of a loop."""
    factor = generator.codec.config.time_factor
    return max(1, round(frames / factor)) * factor + (0 if loop else 1)


def _image(generator, path: str, size_HW: tuple[int, int] | None) -> np.ndarray:
    frames, _ = read_clip_frames(path, max_frames=1)
    return _fitted(generator, frames, size_HW)[0]


def _video(generator, job: Job, size_HW, whole: bool = False) -> tuple[np.ndarray, float]:
    """(frames in whole cells, their rate or the one asked for). whole: job.frames, cut to 1 + 4k at the end."""
    found, fps = read_clip_frames(job.video, max_frames=job.frames if whole else None)
    if whole:
        found = found[: 1 + (len(found) - 1) // generator.codec.config.time_factor * generator.codec.config.time_factor]
    fitted, most = _fitted(generator, found, size_HW), generator.known_size
    size = job.size or fitted.shape[1:3]
    if most and any(n > m for n, m in zip(size, most[1:])):
        log.warning(
            "%s: %dx%d is more than the %dx%d that training knew, and what is made of a given video is not enlarged "
            "from there: expect little of it, or give --size %dx%d",
            job.video, *size, *most[1:], *most[1:],
        )  # fmt: skip
    return fitted, job.fps or fps


def _fitted(generator, frames_THWC: np.ndarray, size_HW: tuple[int, int] | None) -> np.ndarray:
    """Scaled to cover that size and cut to it at the middle; without one, cut to whole cells."""
    H, W = frames_THWC.shape[1:3]
    cell = generator.cell
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
