"""What is larger or longer than all that training saw: made at a size that it knew, and enlarged from there.

A model asked for twice its size at once makes rubble. So frames are made between frames, then pixels between pixels,
at most twice as many at a time, and their detail by the model from a little noise (SDEdit: arXiv:2108.01073), on the
grid of places that training had (position interpolation: arXiv:2306.15595).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from minisora_jax.generate.perform import Decode, Encode, Frames, Verb
from minisora_jax.generate.pictures import stretched
from minisora_jax.generate.request import Given, Request

BETWEEN = 0.3  # strength at which frames between frames are made anew: two blended ones have to become one
DETAIL = 0.03  # and larger pictures: with more, a model draws textures as large in pixels as in training


def sizes_up_to(generator, size_THW: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """From one that training knew to that asked for, each at most twice the one before; frames are added first."""
    most, cell, factor = generator.known_size, generator.cell, generator.codec.config.time_factor
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


def at_known_size(generator, request: Request, make: Callable[[Request], Verb]) -> Verb:
    """make(request) at a size that training knew, and enlarged to that of the request; gives its frames."""
    T, *size = request.size_THW
    sizes = sizes_up_to(generator, (1 if request.loop else T, *size))
    if request.loop:
        sizes = [(T, *size) for _, *size in sizes]
    frames = yield from make(dataclasses.replace(request, size_THW=sizes[0]))
    for size in sizes[1:]:
        frames = yield from enlarged(generator, request, frames, size)
    return frames


def enlarged(generator, request: Request, frames_THWC: np.ndarray, size_THW: tuple[int, int, int]) -> Verb:
    """Frames of a video, or of a loop, at a larger size."""
    whole = dataclasses.replace(request, size_THW=size_THW, spacing=_spacing(generator, size_THW))
    strength = BETWEEN if size_THW[0] > len(frames_THWC) else DETAIL
    return (yield from renewed(generator, whole, stretched(frames_THWC, size_THW), strength))


def enlarged_as_they_come(
    generator, request: Request, frames: Verb, size_HW: tuple[int, int], words: Callable[[int], str]
) -> Verb:
    """A verb's frames at a larger size, piece by piece: memory does not grow with their number.

    words(frame): the prompt at a frame. The codec goes on from piece to piece, as if the video were one.
    """
    factor = generator.codec.config.time_factor
    encoder, decoder = generator.codec.encoder(), generator.codec.decoder()
    done, waiting, answer = 0, None, None

    def larger(some_THWC: np.ndarray) -> Verb:
        size = (len(some_THWC), *size_HW)
        piece = dataclasses.replace(
            request, size_THW=size, prompt=words(done), middle=done > 0, spacing=_spacing(generator, size)
        )
        latents = encoder(stretched(some_THWC, size))
        nothing = np.zeros(generator.grid(piece), bool)
        return decoder((yield dataclasses.replace(piece, given=Given(latents, nothing, DETAIL))))

    while True:
        try:
            asked = frames.send(answer)
        except StopIteration:
            break
        if not isinstance(asked, Frames):
            answer = yield asked
            continue
        answer = None
        waiting = asked.frames_THWC if waiting is None else np.concatenate([waiting, asked.frames_THWC])
        whole = (len(waiting) - (not done)) // factor * factor + (not done)
        if whole:
            yield Frames((yield from larger(waiting[:whole])))
            done, waiting = done + whole, waiting[whole:]
    if len(waiting):
        still = np.repeat(waiting[-1:], factor - len(waiting), axis=0)
        yield Frames((yield from larger(np.concatenate([waiting, still])))[: len(waiting)])


def renewed(generator, request: Request, frames_THWC: np.ndarray, strength: float) -> Verb:
    """Frames made again from noise of that strength over them; nothing of them is known."""
    t, *_ = grid = generator.grid(request)
    # A loop is encoded with itself before itself.
    around = np.concatenate([frames_THWC[-1:], frames_THWC, frames_THWC]) if request.loop else frames_THWC
    latents = (yield Encode(around))[-t:]
    latents = yield dataclasses.replace(request, given=Given(latents, np.zeros(grid, bool), strength))
    return (yield Decode(latents, request.loop))


def _spacing(generator, size_THW: tuple[int, int, int]) -> tuple[float, float, float]:
    if not (most := generator.known_size):
        return (1.0, 1.0, 1.0)
    T, H, W = size_THW
    in_space = min(1.0, most[1] / H, most[2] / W)
    return (min(1.0, (most[0] - 1) / max(T - 1, 1)), in_space, in_space)
