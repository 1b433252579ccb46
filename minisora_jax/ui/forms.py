"""Turn a filled-in form of the page into a job.

Every number has a limit, so that one visitor cannot use up the machine. Impossible jobs are refused before they wait in
the queue.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from minisora_jax.bundled import MODEL
from minisora_jax.diffusion.guidance import GuidanceConfig
from minisora_jax.diffusion.sampler import SAMPLER_NAMES, SamplerConfig
from minisora_jax.generate.pipeline import VideoPipeline
from minisora_jax.io.model_dir import model_hash
from minisora_jax.jobs.hints import picture_hints
from minisora_jax.jobs.job import MOST_SECONDS, SIDES, Job
from minisora_jax.jobs.starting import on_grid, start
from minisora_jax.media.video import STILL_FPS
from minisora_jax.ui.form_fields import FILES, FORMS, GROWN, MISSING
from minisora_jax.ui.uploads import InvalidInput, Upload, display_name

MOST_SIDE = 2048  # pixels
MOST_VOLUME = 2**26  # pixels of all frames of a result
MOST_STEPS = 100
MOST_CHARACTERS = 600  # of a prompt
SHOWN_SIDE = 256  # small results are enlarged by a whole factor to at most so many pixels a side


@dataclasses.dataclass(frozen=True)
class JobSpec:
    """A checked job with its cost."""

    job: Job
    sampling: dict
    volume: int  # pixels of all frames of the result
    upscale: int  # each pixel becomes upscale x upscale pixels of the file
    rounds: int = 1  # about how many times the model samples, one after another
    names: tuple[tuple[str, str], ...] = ()  # (path, the visitor's name of the file)
    reproduce: dict | None = None  # the record of the result to reproduce
    hint: str = ""  # names the words and the pictures that the model does not know


def upscaled(size: tuple[int, int]) -> int:
    """The factor by which the pixels of a result are repeated in its file."""
    return min(max(SHOWN_SIDE // max(size), 1), 4)


def without_paths(error: Exception, names: Iterable[tuple[str, str]]) -> str:
    """The message of an error, with the visitor's file names instead of the server's paths."""
    text = str(error) or type(error).__name__
    for path, name in names:
        text = text.replace(path, name)
    return text


def job_spec(
    pipeline: VideoPipeline, task: str, fields: Mapping[str, Any], validate_upload: Callable[[str, str], Upload]
) -> JobSpec:
    """The job of a filled-in form.

    Args:
        task: a key of `FORMS`.
        fields: prompt, negative, size, length, fps, seed, steps, guidance, sampler, strength, side, grow, and the paths
            of `FILES`.
        validate_upload: checks a file: validate_upload(path, kind).

    Raises:
        InvalidInput: the message says in a sentence what is wrong.
    """
    if task not in FORMS:
        raise InvalidInput(f"there is no task {display_name(str(task))}")
    form = FORMS[task]
    files, names = {}, []
    for need in (n for n in form.needs if n in FILES):
        if path := fields.get(need):
            files[need] = validate_upload(path, FILES[need][0])
            names.append((files[need].path, display_name(path)))
        elif task != "loop":
            raise InvalidInput(MISSING[need])
    values, sampling, volume = _values(pipeline, task, fields, files)
    try:
        job = Job(**values)
        running, fps = start(pipeline, job)
        running.close()
    except (ValueError, OSError) as error:
        raise InvalidInput(without_paths(error, names)) from error
    if sampling["sampler"].name == "dopri5" and job.loop and not job.video:
        raise InvalidInput("dopri5 has no fixed steps, which a loop needs: choose another sampler")
    pictures = [file.path for need, file in files.items() if need != "mask"]
    hints = [pipeline.unknown_words_hint(job.prompt), *picture_hints(pipeline, pictures)]
    hint = without_paths(ValueError(" ".join(filter(None, hints))), names) if any(hints) else ""
    rounds = _rounds(pipeline, job, fps)
    return JobSpec(job, sampling, volume, upscaled(values["size"]), rounds, tuple(names), hint=hint)


def _values(
    pipeline: VideoPipeline, task: str, fields: Mapping[str, Any], files: Mapping[str, Upload]
) -> tuple[dict[str, Any], dict, int]:
    """(the fields of the job, the sampling options, the pixels of all frames of the result)."""
    values: dict[str, Any] = {name: _text(fields, name) for name in ("prompt", "negative")}
    if not values["prompt"]:
        raise InvalidInput("write a prompt, or choose an example")
    first = next(iter(files.values()), None)
    rate = first.fps if first and first.frames > 1 else STILL_FPS
    fps = _number(fields, "fps", 0.5, 60, None)
    values |= {"seed": int(_number(fields, "seed", 0, 2**31 - 1, 0)), "fps": fps}
    size = _size(pipeline, fields, first)
    form, rate = FORMS[task], fps or rate
    seconds, frames = _length(fields.get("length") or form.length, rate)
    if task == "outpaint":  # the video keeps its own size, in whole cells
        size = _outpainted_size(pipeline.cell, files["video"], GROWN.get(str(fields.get("grow")), 1.5))
    values["size"] = size
    total = frames
    if task in ("text_to_video", "loop", "long_video") and not files:
        timed = frames > pipeline.window_frames or "[" in values["prompt"]
        long = task == "long_video" or (task == "text_to_video" and timed)
        values |= {"seconds": seconds} if long else {"frames": on_grid(pipeline, frames, task == "loop")}
        values |= {"loop": True} if task == "loop" else {}
    elif task == "text_to_image":
        values["frames"] = total = 1
    elif task in ("image_to_video", "interpolate"):
        values["frames"] = on_grid(pipeline, max(frames, 9 if task == "interpolate" else 5))
    elif task in ("video_to_video", "inpaint", "outpaint"):
        shown = files["video"].frames_at(rate)
        values["frames"] = total = min(shown, frames or shown)
    else:
        values["seconds"] = seconds
        total = frames * 2 + sum(f.frames_at(rate) for f in files.values())
    values |= {name: files[need].path for need, name in _PATHS if need in files}
    values |= {"strength": _number(fields, "strength", 0.05, 1, 0.6)} if task == "video_to_video" else {}
    values |= {"loop": True} if task == "loop" else {}
    if task == "extend":
        values["extend"] = fields.get("side") if fields.get("side") in SIDES else "forward"
    volume = total * size[0] * size[1]
    if volume > MOST_VOLUME:
        most = MOST_VOLUME // (size[0] * size[1])
        raise InvalidInput(f"{total} frames of {size[0]}x{size[1]} are too many: the limit at this size is {most}")
    sampler = fields.get("sampler") or "heun"
    if sampler not in SAMPLER_NAMES:
        raise InvalidInput(f"there is no sampler {display_name(str(sampler))}; there are {', '.join(SAMPLER_NAMES)}")
    steps = int(_number(fields, "steps", 1, MOST_STEPS, 20))
    guidance = GuidanceConfig(_number(fields, "guidance", 1, 30, 3.0))
    return values, {"sampler": SamplerConfig(sampler, steps), "guidance": guidance}, volume


_PATHS = (("image", "image"), ("last", "last"), ("video", "video"), ("second", "transition"), ("mask", "mask"))


def _outpainted_size(cell: int, video: Upload, grow: float) -> tuple[int, int]:
    """(height, width) of a video in whole cells, times `grow`."""
    if min(video.height, video.width) < cell:
        raise InvalidInput(f"the video has {video.height}x{video.width} pixels: it needs at least {cell} a side")
    height, width = (math.ceil(n // cell * grow) * cell for n in (video.height, video.width))
    if max(height, width) > MOST_SIDE:
        raise InvalidInput(f"{height}x{width} is too large: the limit is {MOST_SIDE} pixels a side")
    return height, width


def _text(fields: Mapping[str, Any], name: str) -> str:
    text = str(fields.get(name) or "").encode("utf-8", "replace").decode().strip()
    if len(text) > MOST_CHARACTERS:
        raise InvalidInput(f"the prompt has {len(text)} characters: shorten it to {MOST_CHARACTERS}")
    return text


def _number(fields: Mapping[str, Any], name: str, low: float, high: float, default: Any) -> Any:
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
    """(seconds, frames) of "2 s" or "17 frames" at `rate` frames per second; (None, 0) for an empty text."""
    if not str(text).strip():
        return None, 0
    match = re.fullmatch(r"([\d.]{1,8})\s*(s|sec|seconds?|f|frames?|)", str(text).strip().lower())
    try:
        number = float(match[1]) if match else 0.0
    except ValueError:
        number = 0.0
    if match is None or not number > 0:
        raise InvalidInput(f'"{display_name(str(text))}" is no length: write 2 s, or 17 frames')
    seconds = number if match[2].startswith("s") else number / rate
    if seconds > MOST_SECONDS:
        raise InvalidInput(f"the video is too long: the limit is {MOST_SECONDS:g} seconds")
    return seconds, max(1, round(seconds * rate))


def _size(pipeline: VideoPipeline, fields: Mapping[str, Any], first: Upload | None) -> tuple[int, int]:
    """(height, width) of the form, or for "auto" a size that fits the input and the model."""
    text = str(fields.get("size") or "auto").strip().lower()
    if text == "auto":
        if first is None:
            return _shape(pipeline, 1, 1, natural_area(pipeline) * 0.75)
        return _shape(pipeline, first.height, first.width, natural_area(pipeline, first))
    match = re.fullmatch(r"(\d{1,5})\s*[x×*]\s*(\d{1,5})", text)
    if not match:
        raise InvalidInput(f'"{display_name(text)}" is no size: write HEIGHTxWIDTH in pixels, such as 48x64, or auto')
    size = int(match[1]), int(match[2])
    if max(size) > MOST_SIDE:
        raise InvalidInput(f"{size[0]}x{size[1]} is too large: the limit is {MOST_SIDE} pixels a side")
    return size


def natural_area(pipeline: VideoPipeline, first: Upload | None = None) -> float:
    """The pixels of a frame for "auto": few for the bundled model, and at most as many as the input has."""
    area = 48 * 64 if pipeline.hash == _bundled() else 480 * 832
    return min(area, first.height * first.width) if first else area


@functools.cache
def _bundled() -> str:
    return model_hash(MODEL)


def _shape(pipeline: VideoPipeline, height: int, width: int, area: float) -> tuple[int, int]:
    """(height, width) in whole cells, with about this aspect and area."""
    scale = math.sqrt(area / (height * width))
    tall, wide = (max(1, round(n * scale / pipeline.cell)) * pipeline.cell for n in (height, width))
    return tall, wide


def _rounds(pipeline: VideoPipeline, job: Job, fps: float) -> int:
    """The approximate number of windows of a long video."""
    if job.seconds is None or job.task not in ("long_video", "extend"):
        return 1
    new = job.seconds * fps - (pipeline.window_frames if job.task == "long_video" else 0)
    step = pipeline.codec.config.time_factor * (pipeline.window - pipeline.overlap)
    if job.task == "extend":
        return max(1, math.ceil(new / step)) * (2 if job.extend == "both" else 1)
    return 1 + max(int("[" in job.prompt and new <= 0), math.ceil(new / step))
