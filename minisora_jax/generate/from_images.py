"""The latents of a video that begins with an image, or leads from one image to another: for models of both kinds."""

from __future__ import annotations

import dataclasses

import numpy as np

from minisora_jax.data.given_frames import as_channels, given_video
from minisora_jax.generate.given_frames import require_able
from minisora_jax.generate.native import NativePipeline
from minisora_jax.generate.request import Request
from minisora_jax.generate.runner import Encode, Task
from minisora_jax.generate.windows import frames_of, with_known
from minisora_jax.media.resize import resized
from minisora_jax.types import GivenFrames


def from_images(
    pipeline: NativePipeline, request: Request, first_HWC: np.ndarray, last_HWC: np.ndarray | None = None
) -> Task:
    """Returns the latents of a request whose first frame is an image and, with a second one, whose end is that.

    A model that reads given frames as channels is given the last frame. Others are given the last latent frame, that of
    a video that stands still on the image.
    """
    size_HW = request.size_THW[1:]
    images = [resized(image[None], size_HW) for image in (first_HWC, last_HWC) if image is not None]
    if pipeline.config.given_channels:
        return (yield from _as_channels(pipeline, request, images))
    known = {0: (yield Encode(images[0]))}
    if len(images) > 1:
        still = yield Encode(np.repeat(images[1], frames_of(pipeline, 3), axis=0))
        known[pipeline.grid(request)[0] - 1] = still[-1:]
    return (yield from with_known(pipeline, request, known))


def _as_channels(pipeline: NativePipeline, request: Request, images: list[np.ndarray]) -> Task:
    require_able(pipeline.config, "interpolate" if len(images) > 1 else "image_to_video")
    T, encoder = request.size_THW[0], pipeline.image_encoder
    frames = {number: image[0] for number, image in zip((0, T - 1), images)}
    latents = yield Encode(given_video(frames, request.size_THW))
    channels = as_channels(latents, np.isin(np.arange(T), list(frames)))
    image_IE = None if encoder is None else np.concatenate(encoder.encode(list(frames.values())))
    return (yield dataclasses.replace(request, frames=GivenFrames(channels, image_IE)))
