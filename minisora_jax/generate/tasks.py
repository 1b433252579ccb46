"""Every task of the model, as requests whose conditioning masks differ.

| task           | given                     | what is known (clean) while the rest is sampled       |
|----------------|---------------------------|-------------------------------------------------------|
| text_to_video  | words                     | nothing; `Request.loop` makes a loop, 1 frame an image |
| image_to_video | an image                  | the first frame                                       |
| interpolate    | two images                | the first and the last frame                          |
| video_to_video | a video                   | nothing; noise starts from its latents (SDEdit)       |
| inpaint        | a video and a mask        | the tokens outside the mask                           |
| outpaint       | a video, a larger frame   | the tokens inside the old frame                       |
| extend         | a video                   | its end, or its beginning                             |
| transition     | two videos                | the end of one and the beginning of the other         |
| long_video     | a storyboard              | window after window, the end of the one before        |

A task is a Python generator: it yields what it needs next (an `Encode`, a `Request` or a `Decode`), is sent the answer,
and yields `Frames` of its result. `run_tasks` runs many tasks at once and packs what they need at one time together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from minisora_jax.generate.frame_ops import eased, feathered, filled
from minisora_jax.generate.from_images import from_images
from minisora_jax.generate.known import leads_over
from minisora_jax.generate.native import NativePipeline
from minisora_jax.generate.request import Given, Request, image_size, video_size
from minisora_jax.generate.runner import Decode, Encode, Frames, Task
from minisora_jax.generate.transitions import led_back, led_over, loop_frames
from minisora_jax.generate.upscaling import regenerated, upscaled, upscaled_stream
from minisora_jax.generate.windows import continued, led_to, windowed


def text_to_video(pipeline: NativePipeline, request: Request) -> Task:
    """Text to video, to an image, or to a loop. Sizes beyond training are upscaled from a trained size."""
    native, *larger = _requests_up_to(pipeline, request)
    pipeline.grid(request)
    if request.loop and leads_over(pipeline.trained):
        frames = yield from loop_frames(pipeline, native)
    else:
        frames = yield Decode((yield native), request.loop)
    yield Frames((yield from upscaled(pipeline, frames, larger)))


def upscale(pipeline: NativePipeline, request: Request, video_THWC: np.ndarray) -> Task:
    """A video at the request's size, which is longer, taller or wider."""
    pipeline.grid(request)
    yield Frames((yield from upscaled(pipeline, video_THWC, [request])))


def image_to_video(pipeline: NativePipeline, request: Request, image_HWC: np.ndarray) -> Task:
    """A video whose first frame is the image as the codec reproduces it."""
    _require_size(request, image_HWC, "the image")
    native, *larger = _requests_up_to(pipeline, request)
    frames = yield Decode((yield from from_images(pipeline, native, image_HWC)))
    yield Frames((yield from upscaled(pipeline, frames, larger)))


def interpolate(pipeline: NativePipeline, request: Request, first_HWC: np.ndarray, last_HWC: np.ndarray) -> Task:
    """From one image to another. Of most models the video stands still on the last one for its last latent frame."""
    _require_size(request, first_HWC, "the first image")
    _require_size(request, last_HWC, "the last image")
    if pipeline.grid(request)[0] < 3:
        raise ValueError(f"frames={request.size_THW[0]} leave nothing between two images: use 9 or more")
    native, *larger = _requests_up_to(pipeline, request)
    frames = yield Decode((yield from from_images(pipeline, native, first_HWC, last_HWC)))
    yield Frames((yield from upscaled(pipeline, frames, larger)))


def video_to_video(pipeline: NativePipeline, request: Request, video_THWC: np.ndarray, strength: float) -> Task:
    """Noise up to `strength` is added to the video's latents and removed by the words of the request."""
    _require_size(request, video_THWC, "the whole video")
    yield Frames((yield from regenerated(pipeline, request, video_THWC, strength)))


def inpaint(pipeline: NativePipeline, request: Request, video_THWC: np.ndarray, mask: np.ndarray) -> Task:
    """What the mask (H, W) or (T, H, W) marks is made anew. All other pixels stay as they are."""
    _require_size(request, video_THWC, "the whole video")
    T, H, W = video_THWC.shape[:3]
    if mask.shape not in ((T, H, W), (1, H, W), (H, W)):
        raise ValueError(f"the mask is {mask.shape}, the video {video_THWC.shape[:3]}: give (H, W) or (T, H, W)")
    mask_THW = np.broadcast_to(mask.astype(bool), video_THWC.shape[:3])
    if not mask_THW.any():
        raise ValueError("the mask marks nothing: white is what is made anew")
    latents = yield Encode(filled(video_THWC, mask_THW))
    known_thw = ~_token_mask(pipeline, mask_THW, pipeline.grid(request))
    sampled = yield dataclasses.replace(request, given=Given(latents, known_thw))
    frames = yield Decode(sampled)
    new = feathered(mask_THW)[..., None]
    yield Frames(np.round(frames * new + video_THWC * (1.0 - new)).astype(np.uint8))


def outpaint(
    pipeline: NativePipeline, request: Request, video_THWC: np.ndarray, corner: tuple[int, int] | None = None
) -> Task:
    """The video in a larger frame, the request's. corner: (y, x) of its top left pixel; None puts it in the middle."""
    T, H, W = video_size(video_THWC)
    _, tall, wide = request.size_THW
    y, x = corner or ((tall - H) // 2, (wide - W) // 2)
    if min(y, x, tall - H - y, wide - W - x) < 0 or (tall, wide) == (H, W):
        video = f"a video of {H}x{W}" + (f" at {y},{x}" if corner else "")
        raise ValueError(f"{video} does not lie within {tall}x{wide} with room to make: give a larger size")
    pads = ((0, 0), (y, tall - H - y), (x, wide - W - x))
    canvas = np.pad(video_THWC, (*pads, (0, 0)), mode="edge")
    yield from inpaint(pipeline, request, canvas, np.pad(np.zeros((T, H, W), bool), pads, constant_values=True))


def extend(
    pipeline: NativePipeline, request: Request, video_THWC: np.ndarray, *, before: int = 0, after: int = 0
) -> Task:
    """The video with frames before and after it. Its own pixels stay, but for `EASE` frames at a seam."""
    _require_size(request, video_THWC, "the video")
    if before + after < 1:
        raise ValueError(f"before={before} and after={after}: extend by at least one frame")
    shown = video_THWC
    if before:
        new, decoded = yield from led_to(pipeline, request, video_THWC, before)
        yield Frames(new)
        shown = eased(shown, decoded, at_end=False)
    if after:
        yield from continued(pipeline, request, shown, video_THWC, after)
    else:
        yield Frames(shown)


def transition(
    pipeline: NativePipeline,
    request: Request,
    a_THWC: np.ndarray,
    b_THWC: np.ndarray,
    *,
    between: int,
    loop: bool = False,
) -> Task:
    """Video a, at least `between` frames that lead from it to b (rounded up to the codec's grid), and video b.

    The pixels of both stay, but for `EASE` frames at a seam. loop: b is a itself; the new frames lead back to its
    beginning, and b is not shown again.
    """
    _require_size(request, a_THWC, "the first video")
    _require_size(request, b_THWC, "the second video")
    latent_frames = -(-(between + 1) // pipeline.codec.config.time_factor)
    if loop:
        pieces = yield from led_back(pipeline, request, a_THWC, latent_frames)
    else:
        new, a_eased, b_eased = yield from led_over(pipeline, request, a_THWC, b_THWC, latent_frames)
        pieces = (a_eased, new, b_eased)
    for piece in pieces:
        yield Frames(piece)


def long_video(
    pipeline: NativePipeline,
    request: Request,
    frames: int,
    prompts: Sequence[tuple[int, str]] = (),
    first_HWC: np.ndarray | None = None,
) -> Task:
    """A video of any length in windows of `pipeline.window` latent frames. Memory does not grow with its length.

    prompts: (first frame, prompt) in order, as `storyboard` returns them; without any, the request's.
    first_HWC: the first frame. The decoder continues from window to window, so that windows have no seams.
    """
    if frames < 1:
        raise ValueError(f"frames={frames} must be at least 1")
    if first_HWC is not None:
        _require_size(request, first_HWC, "the first image")
    prompt_at = lambda frame: next((text for start, text in reversed(prompts) if frame >= start), request.prompt)
    native, *larger = _requests_up_to(pipeline, dataclasses.replace(request, size_THW=(1, *request.size_THW[1:])))
    video = windowed(pipeline, native, frames, prompt_at, first_HWC)
    for bigger in larger:
        video = upscaled_stream(pipeline, video, bigger.size_THW[1:])
    yield from video


# ---- Sizes


def _requests_up_to(pipeline: NativePipeline, request: Request) -> list[Request]:
    """The request at a trained size, then at each larger size up to its own."""
    sizes = pipeline.sizes_up_to(request.size_THW, loop=request.loop)
    return [dataclasses.replace(request, size_THW=size) for size in sizes]


def _require_size(request: Request, pixels: np.ndarray, what: str) -> None:
    """Raise ValueError unless pixels (..., H, W, 3) have the request's size and, of a whole video, its length."""
    T, H, W = request.size_THW
    image_size(pixels) if "image" in what else video_size(pixels)
    if pixels.shape[-3:-1] != (H, W):
        raise ValueError(f"{what} is {pixels.shape[-3]}x{pixels.shape[-2]}, the video asked for {H}x{W}")
    if what == "the whole video" and len(pixels) != T:
        raise ValueError(f"{what} has {len(pixels)} frames, the video asked for {T}")


def _token_mask(pipeline: NativePipeline, mask_THW: np.ndarray, grid_thw: tuple[int, int, int]) -> np.ndarray:
    """bool (t, h, w): tokens of which the mask marks any pixel."""
    t, h, w = grid_thw
    factor, cell = pipeline.codec.config.time_factor, pipeline.cell
    in_space = np.any(mask_THW.reshape(-1, h, cell, w, cell), axis=(2, 4))
    return np.concatenate([in_space[:1], np.any(in_space[1:].reshape(t - 1, factor, h, w), axis=1)])
