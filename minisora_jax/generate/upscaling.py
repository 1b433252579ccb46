"""What is larger or longer than all that training saw: made at a size that it knew, and enlarged from there.

A model asked for twice its size at once makes rubble. So frames are made between frames, at most twice as many at a
time, each anew from the two beside it blended and some noise (SDEdit: arXiv:2108.01073), on the grid of places that
training had (position interpolation: arXiv:2306.15595). Then pixels are made between pixels, by the codec: a decoder
that has seen enlarged clips draws them with sharp edges.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from minisora_jax.generate.frame_ops import stretched
from minisora_jax.generate.request import Given, Request
from minisora_jax.generate.runner import Decode, Encode, Task, altered
from minisora_jax.io.resize import resized

IN_BETWEEN_STRENGTH = 0.3  # strength at which frames between frames are made anew: two blended ones have to become one


def sizes_up_to(pipeline, size_THW: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """From one that training knew to that asked for, each at most twice the one before; frames are added first."""
    most, cell, factor = pipeline.known_size, pipeline.cell, pipeline.codec.config.time_factor
    sizes = [tuple(size_THW)]
    while most:
        T, H, W = sizes[0]
        shrink = min(2.0, max(H / most[1], W / most[2]))
        if shrink > 1:
            smaller = (T, *(max(cell, round(n / shrink / cell) * cell) for n in (H, W)))
        else:
            smaller = (1 + factor * -(-(T - 1) // (2 * factor)) if T > most[0] else T, H, W)
        if smaller == sizes[0]:
            break
        sizes.insert(0, smaller)
    return sizes


def at_known_size(pipeline, request: Request, make: Callable[[Request], Task]) -> Task:
    """make(request) at a size that training knew, and enlarged to that of the request; gives its frames."""
    T, *size = request.size_THW
    sizes = sizes_up_to(pipeline, (1 if request.loop else T, *size))
    if request.loop:
        sizes = [(T, *size) for _, *size in sizes]
    frames = yield from make(dataclasses.replace(request, size_THW=sizes[0]))
    for size in sizes[1:]:
        frames = yield from upscaled(pipeline, request, frames, size)
    return frames


def upscaled(pipeline, request: Request, frames_THWC: np.ndarray, size_THW: tuple[int, int, int]) -> Task:
    """Frames of a video, or of a loop, at a larger size: first as many, then as large as asked for."""
    T, *size = size_THW
    if T > len(frames_THWC):
        known = pipeline.known_size[0] if pipeline.known_size else len(frames_THWC)
        longer = (T, *frames_THWC.shape[1:3])
        asked = dataclasses.replace(request, size_THW=longer, spacing=(min(1.0, (known - 1) / (T - 1)), 1.0, 1.0))
        frames_THWC = yield from regenerated(pipeline, asked, stretched(frames_THWC, T), IN_BETWEEN_STRENGTH)
    if frames_THWC.shape[1:3] == tuple(size):
        return frames_THWC
    latents = yield from _encoded(pipeline, dataclasses.replace(request, size_THW=size_THW), resized(frames_THWC, size))
    return (yield Decode(latents, request.loop))


def regenerated(pipeline, request: Request, frames_THWC: np.ndarray, strength: float) -> Task:
    """Frames made again from noise of that strength over them; nothing of them is known."""
    latents = yield from _encoded(pipeline, request, frames_THWC)
    nothing = np.zeros(pipeline.grid(request), bool)
    latents = yield dataclasses.replace(request, given=Given(latents, nothing, strength))
    return (yield Decode(latents, request.loop))


def upscaled_stream(pipeline, frames: Task, size_HW: tuple[int, int]) -> Task:
    """A verb's frames at a larger size, piece by piece: memory does not grow with their number. The codec goes on from
    piece to piece, as if the video were one."""
    factor = pipeline.codec.config.time_factor
    encoder, decoder = pipeline.codec.encoder(), pipeline.codec.decoder()
    waiting, first = np.zeros((0, 1, 1, 3), np.uint8), 1

    def larger(frames_THWC: np.ndarray | None) -> np.ndarray | None:
        nonlocal waiting, first
        wanted = None
        if frames_THWC is None:  # the end: what is left of a latent frame stands still until it is whole
            wanted = len(waiting)
            frames_THWC = np.repeat(waiting[-1:], -wanted % factor, axis=0)
        waiting = np.concatenate([waiting, frames_THWC]) if len(waiting) else frames_THWC
        whole = (len(waiting) - first) // factor * factor + first
        some, waiting = waiting[:whole], waiting[whole:]
        if not len(some):
            return None
        first = 0
        return decoder(encoder(resized(some, size_HW)))[:wanted]

    return altered(frames, larger)


def _encoded(pipeline, request: Request, frames_THWC: np.ndarray) -> Task:
    """Latents of all frames; a loop is encoded with itself before itself."""
    around = np.concatenate([frames_THWC[-1:], frames_THWC, frames_THWC]) if request.loop else frames_THWC
    return (yield Encode(around))[-pipeline.grid(request)[0] :]
