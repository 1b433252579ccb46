"""Everything to be asked of a model, as requests with different known tokens.

    make       words                     ->  a video, an image, a loop
    animate    a picture                 ->  its first frame is known
    join       two pictures              ->  first and last are
    restyle    a video                   ->  its latents are where noise starts from (SDEdit)
    inpaint    a video and a mask        ->  tokens outside the mask are known
    outpaint   a video, a larger frame   ->  tokens inside the old frame are
    extend     a video                   ->  its end, or its beginning, is
    connect    two videos                ->  the end of one and the beginning of the other are; one with itself: a loop
    rollout    words that change         ->  window after window, each with the end of the one before

A verb is a Python generator: it yields what it needs next (an `Encode`, a `Request`, a `Decode`), is sent the answer,
and yields `Frames` of its result. `perform` runs many verbs at once, and packs what they ask for at one time together.

A codec's latent frame stands for 4 frames of the video and remembers those before it; a clip's first stands for 1.
A video whose beginning is to be made has no past yet: it is encoded as if it had stood still before.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from minisora_jax.generate.perform import Decode, Encode, Frames, Verb
from minisora_jax.generate.pictures import eased, feathered, filled, first_frames, last_frames, stretched
from minisora_jax.generate.request import Given, Request

NEXT_SEED = 1_000_003  # windows of one video have seeds so far apart
SETTLE = 0.6  # strength at which what leads to a video is made again, that video's latents being as they are after it
DETAIL = 0.3  # strength at which an enlarged video's detail is made anew


# ---- Verbs


def make(generator, request: Request) -> Verb:
    """Text to video, or to an image, or to a loop.

    What is longer or larger than all that training saw is made at a length and size that it knew, and enlarged from
    there: frames between frames, pixels between pixels, and their detail by the model.
    """
    generator.grid(request)
    sizes = [request.size_THW] if request.loop else _growing(generator, request.size_THW)
    frames = yield Decode((yield dataclasses.replace(request, size_THW=sizes[0])), request.loop)
    for size in sizes[1:]:
        frames = yield from _enlarged(generator, request, frames, size)
    yield Frames(frames)


def enlarge(generator, request: Request, frames_THWC: np.ndarray) -> Verb:
    """A video in the request's size, longer, taller or wider: its detail is made by the model."""
    generator.grid(request)
    yield Frames((yield from _enlarged(generator, request, frames_THWC, request.size_THW)))


def animate(generator, request: Request, image_HWC: np.ndarray) -> Verb:
    """Image to video: its first frame is the image, as the codec has it."""
    _same_size(request, image_HWC, "the image")
    first = yield Encode(image_HWC[None])
    yield from _decoded(_given(generator, request, {0: first}))


def join(generator, request: Request, first_HWC: np.ndarray, last_HWC: np.ndarray) -> Verb:
    """From one image to another: the video stands still on the last for its last latent frame."""
    _same_size(request, first_HWC, "the first image")
    _same_size(request, last_HWC, "the last image")
    t = generator.grid(request)[0]
    if t < 3:
        raise ValueError(f"frames={request.size_THW[0]} leave nothing between two images: use 9 or more")
    first = yield Encode(first_HWC[None])
    still = yield Encode(np.repeat(last_HWC[None], _frames(generator, 3), axis=0))
    yield from _decoded(_given(generator, request, {0: first, t - 1: still[-1:]}))


def restyle(generator, request: Request, frames_THWC: np.ndarray, strength: float) -> Verb:
    """Video to video: noise is added up to `strength`, and taken away again by the words of the request."""
    _same_size(request, frames_THWC, "the whole video")
    yield Frames((yield from _renewed(generator, request, frames_THWC, strength)))


def inpaint(generator, request: Request, frames_THWC: np.ndarray, mask: np.ndarray) -> Verb:
    """What the mask (H, W) or (T, H, W) marks is made anew; the rest stays, to the pixel."""
    _same_size(request, frames_THWC, "the whole video")
    mask_THW = np.broadcast_to(mask.astype(bool), frames_THWC.shape[:3])
    if not mask_THW.any():
        raise ValueError("the mask marks nothing: white is what is made anew")
    latents = yield Encode(filled(frames_THWC, mask_THW))
    grid = generator.grid(request)
    known = ~_token_mask(generator, mask_THW, grid)
    made = yield dataclasses.replace(request, given=Given(latents, known))
    frames = yield Decode(made)
    new = feathered(mask_THW)[..., None]
    yield Frames(np.round(frames * new + frames_THWC * (1.0 - new)).astype(np.uint8))


def outpaint(generator, request: Request, frames_THWC: np.ndarray, at: tuple[int, int] | None = None) -> Verb:
    """The video in a larger frame, the request's; `at` is where its top left corner comes to lie (the middle)."""
    T, H, W = frames_THWC.shape[:3]
    _, tall, wide = request.size_THW
    y, x = at or ((tall - H) // 2, (wide - W) // 2)
    if min(y, x, tall - H - y, wide - W - x) < 0 or (tall, wide) == (H, W):
        raise ValueError(f"a video of {H}x{W} at {y},{x} does not lie within {tall}x{wide} with room to make")
    pads = ((0, 0), (y, tall - H - y), (x, wide - W - x))
    canvas = np.pad(frames_THWC, (*pads, (0, 0)), mode="edge")
    yield from inpaint(generator, request, canvas, np.pad(np.zeros((T, H, W), bool), pads, constant_values=True))


def extend(generator, request: Request, frames_THWC: np.ndarray, *, before: int = 0, after: int = 0) -> Verb:
    """The video with so many frames made before and after it; itself to the pixel but for `EASE` frames at a seam."""
    _same_size(request, frames_THWC, "the video")
    if before + after < 1:
        raise ValueError(f"before={before} and after={after}: extend by at least one frame")
    given = frames_THWC
    if before:
        made, coded = yield from _backwards(generator, request, frames_THWC, before)
        yield Frames(made)
        given = eased(given, coded, at_end=False)
    if after:
        yield from _onwards(generator, request, given, frames_THWC, after)
    else:
        yield Frames(given)


def connect(
    generator, request: Request, a_THWC: np.ndarray, b_THWC: np.ndarray, *, between: int, loop: bool = False
) -> Verb:
    """Video a, so many frames that lead from it to b (rounded up to the codec's grid), and video b.

    Both themselves to the pixel, but for `EASE` frames at a seam.
    loop: b is a itself; what is made leads back to its beginning, and b is not shown again.
    """
    _same_size(request, a_THWC, "the first video")
    _same_size(request, b_THWC, "the second video")
    factor = generator.codec.config.time_factor
    k = -(-(between + 1) // factor)  # latent frames to make; the last pixel frame of the last is b's first
    room = max(generator.window - k, 2)
    a = last_frames(a_THWC, min((room + 1) // 2, 1 + (len(a_THWC) - 1) // factor), factor)
    b = first_frames(b_THWC, min(room // 2, (len(b_THWC) - 1) // factor), factor)
    past = yield Encode(a)
    future = yield Encode(np.concatenate([np.repeat(b[:1], factor * k, axis=0), b]))
    future = future[1 + k :]
    t = len(past) + k + len(future)
    whole = dataclasses.replace(request, size_THW=(_frames(generator, t), *request.size_THW[1:]))
    latents = yield from _given(generator, whole, {0: past, t - len(future): future})
    frames, until = (yield Decode(latents)), len(a) + factor * k - 1
    # Once more, now that b has a past: what its latents are after it, and what is made up to them.
    latents = yield Encode(np.concatenate([a, frames[len(a) : until], b]))
    known = np.ones(generator.grid(whole), bool)
    known[len(past) : t - len(future)] = False
    latents = yield dataclasses.replace(whole, given=Given(latents, known, SETTLE))
    frames = yield Decode(latents)
    a_eased, b_eased = eased(a_THWC, frames[: len(a)], at_end=True), eased(b_THWC, frames[until:], at_end=False)
    if loop:  # one video, eased at both ends
        rest = len(b_THWC) // 2
        yield Frames(np.concatenate([b_eased[:rest], a_eased[rest:]]))
        yield Frames(frames[len(a) : until])
    else:
        yield Frames(a_eased)
        yield Frames(frames[len(a) : until])
        yield Frames(b_eased)


def rollout(generator, request: Request, frames: int, prompts: Sequence[tuple[int, str]] = ()) -> Verb:
    """A video of any length, in windows of `generator.window` latent frames, each from the end of the one before.

    prompts: (from which frame on, words), in order; without any, the request's. Memory does not grow with length: the
    decoder goes on from where it was, so that windows have no seams.
    """
    words = lambda frame: next((text for start, text in reversed(prompts) if frame >= start), request.prompt)
    whole = dataclasses.replace(request, prompt=words(0))
    if frames <= generator.window_frames and len(prompts) < 2:
        factor = generator.codec.config.time_factor
        size = (_frames(generator, 1 + -(-(frames - 1) // factor)), *request.size_THW[1:])
        latents = yield dataclasses.replace(whole, size_THW=size)
        yield Frames((yield Decode(latents))[:frames])
        return
    decoder = generator.codec.decoder()
    latents = yield dataclasses.replace(whole, size_THW=(generator.window_frames, *request.size_THW[1:]))
    yield from _windows(generator, whole, decoder, latents, 0, frames, words)


# ---- What verbs are made of


def _growing(generator, size_THW: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """Sizes from one that training knew to that asked for, each at most twice the one before."""
    most = generator.known_size
    sizes, cell, factor = [tuple(size_THW)], generator.cell, generator.codec.config.time_factor
    while most and any(n > m for n, m in zip(sizes[0], most)):
        T, H, W = sizes[0]
        shrink = min(2.0, max(H / most[1], W / most[2], 1.0))
        frames = 1 + factor * -(-(T - 1) // (2 * factor)) if T > most[0] else T
        smaller = (frames, *(max(cell, round(n / shrink / cell) * cell) for n in (H, W)))
        if smaller == sizes[0]:
            break
        sizes.insert(0, smaller)
    return sizes


def _enlarged(generator, request: Request, frames_THWC: np.ndarray, size_THW: tuple[int, int, int]) -> Verb:
    """Frames at a larger size, on the grid that training knew: position interpolation and SDEdit (arXiv:2108.01073)."""
    most, spacing = generator.known_size, (1.0, 1.0, 1.0)
    if most:
        in_space = min(1.0, *(m / n for m, n in zip(most[1:], size_THW[1:])))
        spacing = (min(1.0, (most[0] - 1) / max(size_THW[0] - 1, 1)), in_space, in_space)
    whole = dataclasses.replace(request, size_THW=size_THW, spacing=spacing)
    return (yield from _renewed(generator, whole, stretched(frames_THWC, size_THW), DETAIL))


def _renewed(generator, request: Request, frames_THWC: np.ndarray, strength: float) -> Verb:
    """Frames made again from noise of that strength over them; nothing of them is known."""
    latents = yield Encode(frames_THWC)
    known = np.zeros(generator.grid(request), bool)
    return (yield Decode((yield dataclasses.replace(request, given=Given(latents, known, strength)))))


def _given(generator, request: Request, known: dict[int, np.ndarray]) -> Verb:
    """The latents of a request of which some latent frames, from a place in time on, are known."""
    t, h, w = generator.grid(request)
    some = next(iter(known.values()))
    latents, mask = np.zeros((t, *some.shape[1:]), np.float32), np.zeros((t, h, w), bool)
    for start, z in known.items():
        latents[start : start + len(z)] = z
        mask[start : start + len(z)] = True
    return (yield dataclasses.replace(request, given=Given(latents, mask)))


def _decoded(verb: Verb) -> Verb:
    latents = yield from verb
    yield Frames((yield Decode(latents)))


def _window_after(generator, request: Request, known: np.ndarray) -> Verb:
    """A window from the middle of a video whose first latent frames are known."""
    frames = generator.codec.config.time_factor * generator.window
    middle = dataclasses.replace(request, middle=True, size_THW=(frames, *request.size_THW[1:]))
    return (yield from _given(generator, middle, {0: known}))


def _onwards(generator, request: Request, given_THWC: np.ndarray, frames_THWC: np.ndarray, after: int) -> Verb:
    """A video (given: as it is to be shown) and frames that follow it, window by window.

    The decoder goes on from the video's own latents.
    """
    factor = generator.codec.config.time_factor
    new = -(-after // factor)
    keep = max(generator.window - min(new, generator.window - generator.overlap), 1)
    context = last_frames(frames_THWC, min(keep, 1 + (len(frames_THWC) - 1) // factor), factor)
    latents = yield Encode(context)
    decoder = generator.codec.decoder()
    yield Frames(eased(given_THWC, decoder(latents), at_end=True))
    first = min(generator.window, len(latents) + new)
    whole = dataclasses.replace(request, size_THW=(_frames(generator, first), *request.size_THW[1:]))
    known = len(latents)
    latents = yield from _given(generator, whole, {0: latents})
    yield from _windows(generator, request, decoder, latents, known, after, lambda _: request.prompt)


def _windows(
    generator, request: Request, decoder: Callable, latents: np.ndarray, known: int, frames: int, words: Callable
) -> Verb:
    """So many frames of a window's latents, the first `known` of which are shown already, and of those that follow it.

    words(frame): the prompt at a frame, counted from where the first of these is 0.
    """
    made, factor, overlap = 0, generator.codec.config.time_factor, generator.overlap
    for number in itertools.count(1):
        shown = decoder(latents[known:])
        yield Frames(shown[: frames - made])
        made, known = made + len(shown), overlap
        if made >= frames:
            return
        window = _window(request, number)
        window = dataclasses.replace(window, prompt=words(made + factor * (generator.window - overlap) // 2))
        latents = yield from _window_after(generator, window, latents[-overlap:])


def _backwards(generator, request: Request, frames_THWC: np.ndarray, before: int) -> Verb:
    """(the `before` frames that lead to a video, its first frames as decoded after them).

    Windows are made from the last to the first, and decoded from the first on.
    """
    factor = generator.codec.config.time_factor
    new = -(-before // factor)  # latent frames before the one in which the video begins
    keep = max(generator.window - min(1 + new, generator.window - generator.overlap), 1)
    context = first_frames(frames_THWC, min(keep, (len(frames_THWC) - 1) // factor), factor)
    latents = yield Encode(np.concatenate([np.repeat(context[:1], factor, axis=0), context]))
    # The video's first frame is the last of a latent frame that is missing; where it is all there is, it stood still.
    latents, missing = (latents[2:], 1 + new) if len(latents) > 2 else (latents[1:], new)
    number = 0
    while missing:
        overlap = min(len(latents), generator.overlap if number else keep)
        step = min(missing, generator.window - overlap)
        begins = step == missing
        frames = _frames(generator, step + overlap) if begins else factor * (step + overlap)
        window = dataclasses.replace(
            _window(request, number), middle=not begins, size_THW=(frames, *request.size_THW[1:])
        )
        made = yield from _given(generator, window, {step: latents[:overlap]})
        latents, missing, number = np.concatenate([made[:step], latents]), missing - step, number + 1
    frames = yield Decode(latents)
    return frames[factor * new - before : factor * new], frames[factor * new :]


def _window(request: Request, number: int) -> Request:
    """The request for a window: its noise is its own."""
    return dataclasses.replace(request, seed=request.seed + number * NEXT_SEED)


def _frames(generator, latent_frames: int) -> int:
    return 1 + (latent_frames - 1) * generator.codec.config.time_factor


def _same_size(request: Request, pictures: np.ndarray, what: str) -> None:
    """ValueError unless pictures (..., H, W, 3) are of the size asked for, and, if a whole video, as many."""
    T, H, W = request.size_THW
    if pictures.shape[-3:-1] != (H, W):
        raise ValueError(f"{what} is {pictures.shape[-3]}x{pictures.shape[-2]}, the video asked for {H}x{W}")
    if what == "the whole video" and len(pictures) != T:
        raise ValueError(f"{what} has {len(pictures)} frames, the video asked for {T}")


def _token_mask(generator, mask_THW: np.ndarray, grid_thw: tuple[int, int, int]) -> np.ndarray:
    """bool (t, h, w): tokens of which the mask marks any pixel."""
    t, h, w = grid_thw
    factor, cell = generator.codec.config.time_factor, generator.cell
    in_space = mask_THW.reshape(-1, h, cell, w, cell).any((2, 4))
    return np.concatenate([in_space[:1], in_space[1:].reshape(t - 1, factor, h, w).any(1)])
