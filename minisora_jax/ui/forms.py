"""What is filled in on the page, as jobs: a form for everything that jobs/job.py can do.

Every number is bounded here, so that one visitor cannot ask for more than the machine has, and what is impossible is
said before anyone waits for it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping

from minisora_jax.bundled import MODEL
from minisora_jax.diffusion.guidance import GuidanceConfig
from minisora_jax.diffusion.sampler import SAMPLER_NAMES, SamplerConfig
from minisora_jax.io.model_dir import model_hash
from minisora_jax.io.video import STILL_FPS
from minisora_jax.jobs.job import MOST_SECONDS, SIDES, Job
from minisora_jax.jobs.starting import on_grid, start
from minisora_jax.ui.uploads import InvalidInput, Upload, called

MOST_SIDE = 2048
MOST_VOLUME = 2**26  # pixels of all frames of a result
MOST_STEPS = 100
MOST_WORDS = 600  # letters of a prompt
SHOWN_SIDE = 256  # small results are enlarged towards this many pixels, as their pixels are to be seen


@dataclasses.dataclass(frozen=True)
class Form:
    """One thing to ask for. needs: the files and settings that it has beside the prompt."""

    title: str
    hint: str
    needs: tuple[str, ...]
    length: str  # by default; "" for all of the video
    examples: tuple[tuple[str, str], ...]  # the prompt, and the name of a set of files of examples.py


PLAIN = "a large red circle moves left slowly on a black background"
FORMS = {
    "words": Form(
        "Video",
        "A video from words alone.",
        (),
        "17 frames",
        (
            (PLAIN, ""),
            ("a small cyan triangle bounces off the walls on a navy background", ""),
            ("a red circle moves up and a blue square stays still on a grey background", ""),
            ("the camera pans right past a small green cross on a checkered background", ""),
        ),
    ),
    "image": Form(
        "Image",
        "A picture from words, up to 2048x2048 pixels.",
        (),
        "1 frame",
        (
            ("a photo of a large blue square on a grey background", ""),
            ("a photo of a small green triangle on a navy background", ""),
        ),
    ),
    "long": Form(
        "Long video",
        "Up to a minute. What stands after [4s] begins four seconds in.",
        (),
        "9 s",
        (
            ("a red circle grows on a black background [4s] a red circle moves up on a black background", ""),
            ("a white square moves in a circle on a navy background", ""),
        ),
    ),
    "loop": Form(
        "Loop",
        "A video whose end meets its beginning; with a video, one that leads from its end to its beginning.",
        ("video",),
        "16 frames",
        (
            ("a large yellow circle moves in a circle on a black background", ""),
            ("a large red circle moves left on a black background", "clip"),
        ),
    ),
    "image_to_video": Form(
        "Animate",
        "A picture is the first frame, and the words say what happens.",
        ("image",),
        "17 frames",
        (("a large red circle moves right on a black background", "picture"),),
    ),
    "interpolate": Form(
        "Join",
        "From one picture to another.",
        ("image", "last"),
        "17 frames",
        (("a large red circle moves right on a black background", "two pictures"),),
    ),
    "video_to_video": Form(
        "Restyle",
        "A video made again by other words: at strength 0 it stays, at 1 all is new.",
        ("video", "strength"),
        "",
        (("a large blue circle moves left on a black background", "clip"),),
    ),
    "inpaint": Form(
        "Inpaint",
        "What the mask has white is made anew; all else stays, to the pixel.",
        ("video", "mask"),
        "",
        (("a large green circle moves left on a black background", "clip and mask"),),
    ),
    "outpaint": Form(
        "Outpaint",
        "The video in a larger frame, whose edges are made.",
        ("video", "grow"),
        "",
        (("a small red circle moves left on a black background", "clip"),),
    ),
    "extend": Form(
        "Extend",
        "What comes after a video, or before it, or both.",
        ("video", "side"),
        "1 s",
        (("a large red circle moves left on a black background", "clip"),),
    ),
    "transition": Form(
        "Connect",
        "What leads from one video to another.",
        ("video", "second"),
        "1 s",
        (("a large red circle moves left on a black background", "two clips"),),
    ),
}
FILES = {  # of a form: what uploads.py is to make sure of, and what to call it
    "image": ("picture", "Picture"),
    "last": ("picture", "Last picture"),
    "video": ("video", "Video"),
    "second": ("video", "Video that follows"),
    "mask": ("mask", "Mask: white is made anew"),
}
MISSING = {
    "image": "choose a picture to begin with",
    "last": "choose the picture to end with",
    "video": "choose a video",
    "second": "choose the video to lead to",
    "mask": "choose a mask: a picture, or a video as long as the other",
}
GROWN = {"a quarter larger": 1.25, "a third larger": 4 / 3, "half as large again": 1.5, "twice as large": 2.0}


@dataclasses.dataclass(frozen=True)
class JobSpec:
    """A job that can begin, as far as can be told, and what it takes."""

    job: Job
    sampling: dict
    volume: int  # pixels of all frames of the result
    upscale: int
    rounds: int = 1  # about how many times the model is sampled, one after another
    names: tuple[tuple[str, str], ...] = ()  # (path, what its owner calls it)
    again: dict | None = None  # the record of what is to be made once more


def upscaled(size: tuple[int, int]) -> int:
    """How many times a pixel is repeated in files."""
    return min(max(SHOWN_SIDE // max(size), 1), 4)


def plainly(error: Exception, names: Iterable[tuple[str, str]]) -> str:
    """What an error says, without paths of ours."""
    text = str(error) or type(error).__name__
    for path, name in names:
        text = text.replace(path, name)
    return text


def spec(pipeline, task: str, fields: Mapping, validate_upload: Callable[[str, str], Upload]) -> JobSpec:
    """What is filled in, as a job. `Refused` says in a sentence what is wrong with it.

    said: prompt, negative, size, length, fps, seed, steps, guidance, sampler, strength, side, grow, and paths of files
    as FILES has them; admit(path, kind) lets a file in.
    """
    if task not in FORMS:
        raise InvalidInput(f"{called(str(task))} is nothing that can be asked for")
    form = FORMS[task]
    files, names = {}, []
    for need in (n for n in form.needs if n in FILES):
        if path := fields.get(need):
            files[need] = validate_upload(path, FILES[need][0])
            names.append((files[need].path, called(path)))
        elif task != "loop":
            raise InvalidInput(MISSING[need])
    values, sampling, volume = _values(pipeline, task, fields, files)
    try:
        job = Job(**values)
        running, fps = start(pipeline, job)
        running.close()
    except (ValueError, OSError) as error:
        raise InvalidInput(plainly(error, names)) from error
    if sampling["sampler"].name == "dopri5" and job.loop and not job.video:
        raise InvalidInput("dopri5 has no steps, at which a loop could be turned: choose another sampler")
    return JobSpec(job, sampling, volume, upscaled(job.size), _rounds(pipeline, job, fps), tuple(names))


def _values(pipeline, task: str, fields: Mapping, files: Mapping[str, Upload]) -> tuple[dict, dict, int]:
    """(what the job says, the sampling, pixels of the result)."""
    values = {"prompt": _words(fields, "prompt"), "negative": _words(fields, "negative")}
    if not values["prompt"]:
        raise InvalidInput("say in words what is to be seen, or choose an example")
    first = next(iter(files.values()), None)
    rate = first.fps if first and first.frames > 1 else STILL_FPS
    fps = _number(fields, "fps", 0.5, 60, None)
    values |= {"seed": int(_number(fields, "seed", 0, 2**31 - 1, 0)), "fps": fps}
    size = _size(pipeline, fields, first)
    form, rate = FORMS[task], fps or rate
    seconds, frames = _length(fields.get("length") or form.length, rate)
    if task == "outpaint":  # it stays at its own size, in whole cells
        grow, cell = GROWN.get(fields.get("grow"), 1.5), pipeline.cell
        if min(first.height, first.width) < cell:
            raise InvalidInput(
                f"the video has {first.height}x{first.width} pixels: at least {cell} a side are needed here"
            )
        size = tuple(math.ceil(n // cell * grow) * cell for n in (first.height, first.width))
        if max(size) > MOST_SIDE:
            raise InvalidInput(f"{size[0]}x{size[1]} would be too large: at most {MOST_SIDE} pixels a side are made")
    values["size"] = size
    total = frames
    if task in ("words", "loop", "long") and not files:
        long = task == "long" or (task == "words" and (frames > pipeline.window_frames or "[" in values["prompt"]))
        values |= {"seconds": seconds} if long else {"frames": on_grid(pipeline, frames, task == "loop")}
        values |= {"loop": True} if task == "loop" else {}
    elif task == "image":
        values["frames"] = total = 1
    elif task in ("image_to_video", "interpolate"):
        values["frames"] = on_grid(pipeline, max(frames, 9 if task == "interpolate" else 5))
    elif task in ("video_to_video", "inpaint", "outpaint"):
        total = min(first.frames, frames or first.frames)
        values["frames"] = total
    else:
        values["seconds"] = seconds
        total = frames * 2 + sum(f.frames for f in files.values())
    values |= {name: files[need].path for need, name in _PATHS if need in files}
    values |= {"strength": _number(fields, "strength", 0.05, 1, 0.6)} if task == "video_to_video" else {}
    values |= {"loop": True} if task == "loop" else {}
    if task == "extend":
        values["extend"] = fields.get("side") if fields.get("side") in SIDES else "forward"
    volume = total * size[0] * size[1]
    if volume > MOST_VOLUME:
        most = MOST_VOLUME // (size[0] * size[1])
        raise InvalidInput(f"at {size[0]}x{size[1]} at most {most} frames are made here, and this asks for {total}")
    sampler = fields.get("sampler") or "heun"
    if sampler not in SAMPLER_NAMES:
        raise InvalidInput(f"there is no sampler {called(str(sampler))}; there are {', '.join(SAMPLER_NAMES)}")
    steps = int(_number(fields, "steps", 1, MOST_STEPS, 20))
    guidance = GuidanceConfig(_number(fields, "guidance", 1, 30, 3.0))
    return values, {"sampler": SamplerConfig(sampler, steps), "guidance": guidance}, volume


_PATHS = (("image", "image"), ("last", "last"), ("video", "video"), ("second", "transition"), ("mask", "mask"))


def _words(fields: Mapping, name: str) -> str:
    text = str(fields.get(name) or "").encode("utf-8", "replace").decode().strip()
    if len(text) > MOST_WORDS:
        raise InvalidInput(f"the prompt has {len(text)} letters, and at most {MOST_WORDS} are read: say it in fewer")
    return text


def _number(fields: Mapping, name: str, low: float, high: float, default):
    value = fields.get(name)
    if value is None or value == "":
        return default
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not low <= number <= high:
        raise InvalidInput(f"{name} must be a number from {low:g} to {high:g}")
    return number


def _length(text: str, rate: float) -> tuple[float | None, int]:
    """(seconds, frames) of "2 s" or "17 frames" at that rate; (None, 0) for nothing said."""
    if not str(text).strip():
        return None, 0
    fields = re.fullmatch(r"([\d.]{1,8})\s*(s|sec|seconds?|f|frames?|)", str(text).strip().lower())
    try:
        number = float(fields[1]) if fields else 0.0
    except ValueError:
        number = 0.0
    if not number > 0:
        raise InvalidInput(f'"{called(str(text))}" is no length: write 2 s, or 17 frames')
    seconds = number if fields[2].startswith("s") else number / rate
    if seconds > MOST_SECONDS:
        raise InvalidInput(f"at most {MOST_SECONDS:g} seconds are made")
    return seconds, max(1, round(seconds * rate))


def _size(pipeline, fields: Mapping, first: Upload | None) -> tuple[int, int]:
    """(height, width) that is asked for, or that suits the input and the model."""
    text = str(fields.get("size") or "auto").strip().lower()
    if text == "auto":
        if first is None:
            return _shape(pipeline, 1, 1, natural_area(pipeline) * 0.75)
        return _shape(pipeline, first.height, first.width, natural_area(pipeline, first))
    found = re.fullmatch(r"(\d{1,5})\s*[x×*]\s*(\d{1,5})", text)
    if not found:
        raise InvalidInput(f'"{called(text)}" is no size: write HEIGHTxWIDTH in pixels, such as 48x64, or auto')
    size = int(found[1]), int(found[2])
    if max(size) > MOST_SIDE:
        raise InvalidInput(f"{size[0]}x{size[1]} is too large: at most {MOST_SIDE} pixels a side are made")
    return size


def natural_area(pipeline, first: Upload | None = None) -> float:
    """Pixels that the model is used to: of the bundled one few. No more than the input has."""
    area = 48 * 64 if pipeline.hash == _bundled() else 480 * 832
    return min(area, first.height * first.width) if first else area


@functools.cache
def _bundled() -> str:
    return model_hash(MODEL)


def _shape(pipeline, height: int, width: int, area: float) -> tuple[int, int]:
    """Whole cells of about that aspect and area."""
    scale = math.sqrt(area / (height * width))
    return tuple(max(1, round(n * scale / pipeline.cell)) * pipeline.cell for n in (height, width))


def _rounds(pipeline, job: Job, fps: float) -> int:
    """About how many windows a long video has."""
    if job.seconds is None or job.task not in ("long_video", "extend"):
        return 1
    new = job.seconds * fps - (pipeline.window_frames if job.task == "long_video" else 0)
    step = pipeline.codec.config.time_factor * (pipeline.window - pipeline.overlap)
    if job.task == "extend":
        return max(1, math.ceil(new / step)) * (2 if job.extend == "both" else 1)
    return 1 + max(int("[" in job.prompt and new <= 0), math.ceil(new / step))
