"""Videos longer than the model makes at once: windows of latent frames, each starting from the end of the last one.

A codec's latent frame stands for 4 frames of the video and remembers those before it; a clip's first one stands for 1.
A video whose beginning is to be made has no past yet: it is encoded as if it had stood still before.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np

from minisora_jax.generate.frame_ops import eased, first_frames, last_frames
from minisora_jax.generate.native import NativePipeline
from minisora_jax.generate.request import Given, Request
from minisora_jax.generate.runner import Decode, Encode, Frames, Task
from minisora_jax.media.resize import resized

WINDOW_SEED = 1_000_003  # the distance of the seeds of two windows


def with_known(pipeline: NativePipeline, request: Request, known: dict[int, np.ndarray]) -> Task:
    """Returns the latents of a request. known: latents (t, h, w, c) by the latent frame at which they start."""
    t, h, w = pipeline.grid(request)
    example = next(iter(known.values()))
    latents, mask = np.zeros((t, *example.shape[1:]), np.float32), np.zeros((t, h, w), bool)
    for start, z in known.items():
        latents[start : start + len(z)] = z
        mask[start : start + len(z)] = True
    return (yield dataclasses.replace(request, given=Given(latents, mask)))


def windowed(
    pipeline: NativePipeline, request: Request, frames: int, prompt_at: Callable, first_HWC: np.ndarray | None = None
) -> Task:
    """Yields `frames` frames at the request's size. prompt_at(frame): the prompt at that frame."""
    size_HW, whole = request.size_THW[1:], dataclasses.replace(request, prompt=prompt_at(0))
    latent_frames = 1 + -(-(frames - 1) // pipeline.codec.config.time_factor)
    one_window = prompt_at(frames - 1) == prompt_at(0) and latent_frames <= pipeline.window
    window_frames = frames_of(pipeline, latent_frames if one_window else pipeline.window)
    first = dataclasses.replace(whole, size_THW=(window_frames, *size_HW))
    if first_HWC is None:
        latents = yield first
    else:
        known = yield Encode(resized(first_HWC[None], size_HW))
        latents = yield from with_known(pipeline, first, {0: known})
    yield from _next_windows(pipeline, whole, pipeline.codec.decoder(), latents, 0, frames, prompt_at)


def continued(
    pipeline: NativePipeline, request: Request, shown_THWC: np.ndarray, video_THWC: np.ndarray, after: int
) -> Task:
    """Yields a video and `after` frames that follow it. shown_THWC: the video as it is to be shown.

    The decoder continues from the video's own latents.
    """
    factor = pipeline.codec.config.time_factor
    new = -(-after // factor)
    keep = max(pipeline.window - min(new, pipeline.window - pipeline.overlap), 1)
    context = last_frames(video_THWC, min(keep, 1 + (len(video_THWC) - 1) // factor), factor)
    latents = yield Encode(context)
    decoder = pipeline.codec.decoder()
    yield Frames(eased(shown_THWC, decoder(latents), at_end=True))
    first = min(pipeline.window, len(latents) + new)
    whole = dataclasses.replace(request, size_THW=(frames_of(pipeline, first), *request.size_THW[1:]))
    n_known = len(latents)
    latents = yield from with_known(pipeline, whole, {0: latents})
    yield from _next_windows(pipeline, request, decoder, latents, n_known, after, lambda _: request.prompt)


def _next_windows(
    pipeline: NativePipeline,
    request: Request,
    decoder: Callable,
    latents: np.ndarray,
    n_known: int,
    frames: int,
    prompt_at: Callable[[int], str],
) -> Task:
    """Yields `frames` frames of a window's latents and of the windows after it.

    The first `n_known` latent frames are shown already. Frame 0 of `prompt_at` is the first frame that is yielded.
    """
    done, factor, overlap = 0, pipeline.codec.config.time_factor, pipeline.overlap
    for number in itertools.count(1):
        decoded = decoder(latents[n_known:])
        yield Frames(decoded[: frames - done])
        done, n_known = done + len(decoded), overlap
        if done >= frames:
            return
        prompt = prompt_at(done + factor * (pipeline.window - overlap) // 2)
        window = dataclasses.replace(window_request(request, number), prompt=prompt)
        size_THW = (factor * pipeline.window, *request.size_THW[1:])
        middle = dataclasses.replace(window, middle=True, size_THW=size_THW)
        latents = yield from with_known(pipeline, middle, {0: latents[-overlap:]})


def led_to(pipeline: NativePipeline, request: Request, video_THWC: np.ndarray, before: int) -> Task:
    """Returns (the `before` frames that lead to a video, the video's first frames as decoded after them).

    Windows are made from the last to the first and decoded from the first on.
    """
    factor = pipeline.codec.config.time_factor
    new = -(-before // factor)  # latent frames before the one in which the video begins
    keep = max(pipeline.window - min(1 + new, pipeline.window - pipeline.overlap), 1)
    context = first_frames(video_THWC, min(keep, (len(video_THWC) - 1) // factor), factor)
    latents = yield Encode(np.concatenate([np.repeat(context[:1], factor, axis=0), context]))
    # The video's first frame is the last frame of a latent frame that is missing. A video of one latent frame stands
    # still for the time before it.
    latents, missing = (latents[2:], 1 + new) if len(latents) > 2 else (latents[1:], new)
    number = 0
    while missing:
        overlap = min(len(latents), pipeline.overlap if number else keep)
        step = min(missing, pipeline.window - overlap)
        is_first = step == missing
        frames = frames_of(pipeline, step + overlap) if is_first else factor * (step + overlap)
        size_THW = (frames, *request.size_THW[1:])
        window = dataclasses.replace(window_request(request, number), middle=not is_first, size_THW=size_THW)
        sampled = yield from with_known(pipeline, window, {step: latents[:overlap]})
        latents, missing, number = np.concatenate([sampled[:step], latents]), missing - step, number + 1
    frames = yield Decode(latents)
    return frames[factor * new - before : factor * new], frames[factor * new :]


def window_request(request: Request, number: int) -> Request:
    """The request for a window: its noise is its own."""
    return dataclasses.replace(request, seed=request.seed + number * WINDOW_SEED)


def frames_of(pipeline: NativePipeline, latent_frames: int) -> int:
    """Frames of a clip with that many latent frames."""
    return 1 + (latent_frames - 1) * pipeline.codec.config.time_factor
