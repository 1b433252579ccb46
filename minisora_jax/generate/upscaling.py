"""Sizes beyond training: videos are made at a trained size and upscaled from there.

A model that is asked for twice its size at once makes rubble. So new frames are sampled between frames, at most twice
as many at a time, each from the blend of its two neighbours and some noise (SDEdit: arXiv:2108.01073), at the positions
of training (position interpolation: arXiv:2306.15595). Then pixels are added by the codec alone: its decoder was
trained on enlarged clips and draws them with sharp edges.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from minisora_jax.generate.frame_ops import stretched
from minisora_jax.generate.native import NativePipeline
from minisora_jax.generate.request import Given, Request
from minisora_jax.generate.runner import Decode, Encode, Task, altered
from minisora_jax.media.resize import resized

IN_BETWEEN_STRENGTH = 0.3  # noise for frames between frames: enough to make one picture of two blended ones


def upscaled(pipeline: NativePipeline, frames_THWC: np.ndarray, larger: Sequence[Request]) -> Task:
    """Returns the frames at the size of each request of `larger` in turn: frames are added first, then pixels."""
    for request in larger:
        T, H, W = request.size_THW
        if T > len(frames_THWC):
            frames_THWC = yield from _with_frames_between(pipeline, request, frames_THWC)
        if frames_THWC.shape[1:3] != (H, W):
            latents = yield from _encoded(pipeline, request, resized(frames_THWC, (H, W)))
            frames_THWC = yield Decode(latents, request.loop)
    return frames_THWC


def _with_frames_between(pipeline: NativePipeline, request: Request, frames_THWC: np.ndarray) -> Task:
    T, known = request.size_THW[0], pipeline.known_size[0] if pipeline.known_size else len(frames_THWC)
    spacing = (min(1.0, (known - 1) / (T - 1)), 1.0, 1.0)
    longer = dataclasses.replace(request, size_THW=(T, *frames_THWC.shape[1:3]), spacing=spacing)
    return (yield from regenerated(pipeline, longer, stretched(frames_THWC, T), IN_BETWEEN_STRENGTH))


def regenerated(pipeline: NativePipeline, request: Request, frames_THWC: np.ndarray, strength: float) -> Task:
    """Returns frames sampled from the given ones with noise of `strength`; nothing of them is known."""
    latents = yield from _encoded(pipeline, request, frames_THWC)
    nothing = np.zeros(pipeline.grid(request), bool)
    latents = yield dataclasses.replace(request, given=Given(latents, nothing, strength))
    return (yield Decode(latents, request.loop))


def upscaled_stream(pipeline: NativePipeline, frames: Task, size_HW: tuple[int, int]) -> Task:
    """A task's frames at a larger size, piece by piece, so that memory does not grow with their number.

    The codec continues from piece to piece as if the video were one.
    """
    factor = pipeline.codec.config.time_factor
    encoder, decoder = pipeline.codec.encoder(), pipeline.codec.decoder()
    waiting, first = np.zeros((0, 1, 1, 3), np.uint8), 1

    def larger(frames_THWC: np.ndarray | None) -> np.ndarray | None:
        nonlocal waiting, first
        keep = None
        if frames_THWC is None:  # the end: the last frame stands still until its latent frame is whole
            keep = len(waiting)
            frames_THWC = np.repeat(waiting[-1:], -keep % factor, axis=0)
        waiting = np.concatenate([waiting, frames_THWC]) if len(waiting) else frames_THWC
        whole = (len(waiting) - first) // factor * factor + first
        piece, waiting = waiting[:whole], waiting[whole:]
        if not len(piece):
            return None
        first = 0
        return decoder(encoder(resized(piece, size_HW)))[:keep]

    return altered(frames, larger)


def _encoded(pipeline: NativePipeline, request: Request, frames_THWC: np.ndarray) -> Task:
    """Returns the latents of all frames. A loop is encoded with itself before itself, from where it is decoded."""
    if request.loop:
        turned = np.roll(frames_THWC, pipeline.loop_start, axis=0)
        frames_THWC = np.concatenate([turned[-1:], turned, turned])
    return (yield Encode(frames_THWC))[-pipeline.grid(request)[0] :]
