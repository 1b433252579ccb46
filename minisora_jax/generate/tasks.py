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

from minisora_jax.generate.frame_ops import eased, evened, feathered, filled, first_frames, largest_step, last_frames
from minisora_jax.generate.request import Given, Request
from minisora_jax.generate.runner import Decode, Encode, Frames, Verb
from minisora_jax.generate.upscaling import at_known_size, enlarged, enlarged_as_they_come, renewed, sizes_up_to
from minisora_jax.io.resize import resized

NEXT_SEED = 1_000_003  # windows of one video have seeds so far apart
SETTLE = 0.6  # strength at which what leads to a video is made again, that video's latents being as they are after it
SEAMLESS, TRIES = 2.0, 3  # a transition is made so often at most, until no step of it is above so many medians


# ---- Verbs


def make(generator, request: Request) -> Verb:
    """Text to video, or to an image, or to a loop; what is longer or larger than training knew is enlarged."""
    generator.grid(request)

    def made(request: Request) -> Verb:
        return (yield Decode((yield request), request.loop))

    yield Frames((yield from at_known_size(generator, request, made)))


def enlarge(generator, request: Request, frames_THWC: np.ndarray) -> Verb:
    """A video in the request's size, longer, taller or wider."""
    generator.grid(request)
    yield Frames((yield from enlarged(generator, request, frames_THWC, request.size_THW)))


def animate(generator, request: Request, image_HWC: np.ndarray) -> Verb:
    """Image to video: its first frame is the image, as the codec has it, at a size that training knew."""
    _same_size(request, image_HWC, "the image")

    def made(request: Request) -> Verb:
        first = yield Encode(resized(image_HWC[None], request.size_THW[1:]))
        return (yield Decode((yield from _given(generator, request, {0: first}))))

    yield Frames((yield from at_known_size(generator, request, made)))


def join(generator, request: Request, first_HWC: np.ndarray, last_HWC: np.ndarray) -> Verb:
    """From one image to another: the video stands still on the last for its last latent frame."""
    _same_size(request, first_HWC, "the first image")
    _same_size(request, last_HWC, "the last image")
    if generator.grid(request)[0] < 3:
        raise ValueError(f"frames={request.size_THW[0]} leave nothing between two images: use 9 or more")

    def made(request: Request) -> Verb:
        t, size_HW = generator.grid(request)[0], request.size_THW[1:]
        first = yield Encode(resized(first_HWC[None], size_HW))
        still = yield Encode(np.repeat(resized(last_HWC[None], size_HW), _frames(generator, 3), axis=0))
        latents = yield from _given(generator, request, {0: first, t - 1: still[-1:]})
        return (yield Decode(latents))

    yield Frames((yield from at_known_size(generator, request, made)))


def restyle(generator, request: Request, frames_THWC: np.ndarray, strength: float) -> Verb:
    """Video to video: noise is added up to `strength`, and taken away again by the words of the request."""
    _same_size(request, frames_THWC, "the whole video")
    yield Frames((yield from renewed(generator, request, frames_THWC, strength)))


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
    known = np.ones(generator.grid(whole), bool)
    known[len(past) : t - len(future)] = False
    until, tries = len(a) + factor * k - 1, []

    def seamless(frames: np.ndarray) -> bool:
        before, after = eased(a, frames[: len(a)], at_end=True), eased(b, frames[until:], at_end=False)
        seen = np.concatenate([before, frames[len(a) : until], after])
        tries.append((largest_step(seen, slice(len(a) - 1, until)), frames))
        return tries[-1][0] <= SEAMLESS

    for number in range(TRIES):
        window = _window(whole, number)
        latents = yield from _given(generator, window, {0: past, t - len(future): future})
        if seamless(frames := (yield Decode(latents))):
            break
        # Once more, now that b has a past: what its latents are after it, and what is made up to them.
        latents = yield Encode(np.concatenate([a, frames[len(a) : until], b]))
        latents = yield dataclasses.replace(window, given=Given(latents, known, SETTLE))
        if seamless((yield Decode(latents))):
            break
    largest, frames = min(tries, key=lambda each: each[0])
    a_eased, b_eased = eased(a_THWC, frames[: len(a)], at_end=True), eased(b_THWC, frames[until:], at_end=False)
    made = frames[len(a) : until]
    if largest > SEAMLESS:
        made = evened(np.concatenate([a_eased[-1:], made, b_eased[:1]]))[1:-1]
    if loop:  # one video, eased at both ends
        rest = len(b_THWC) // 2
        yield Frames(np.concatenate([b_eased[:rest], a_eased[rest:]]))
        yield Frames(made)
    else:
        yield Frames(a_eased)
        yield Frames(made)
        yield Frames(b_eased)


def rollout(
    generator,
    request: Request,
    frames: int,
    prompts: Sequence[tuple[int, str]] = (),
    first_HWC: np.ndarray | None = None,
) -> Verb:
    """A video of any length, in windows of `generator.window` latent frames, each from the end of the one before.

    prompts: (from which frame on, words), in order; without any, the request's. first_HWC: its first frame. Memory does
    not grow with length: the decoder goes on from where it was, so that windows have no seams.
    """
    words = lambda frame: next((text for start, text in reversed(prompts) if frame >= start), request.prompt)
    smallest, *larger = sizes_up_to(generator, (1, *request.size_THW[1:]))
    video = _rolled(generator, dataclasses.replace(request, size_THW=smallest), frames, words, first_HWC)
    for _, *size in larger:
        video = enlarged_as_they_come(generator, video, tuple(size))
    yield from video


# ---- What verbs are made of


def _given(generator, request: Request, known: dict[int, np.ndarray]) -> Verb:
    """The latents of a request of which some latent frames, from a place in time on, are known."""
    t, h, w = generator.grid(request)
    some = next(iter(known.values()))
    latents, mask = np.zeros((t, *some.shape[1:]), np.float32), np.zeros((t, h, w), bool)
    for start, z in known.items():
        latents[start : start + len(z)] = z
        mask[start : start + len(z)] = True
    return (yield dataclasses.replace(request, given=Given(latents, mask)))


def _rolled(generator, request: Request, frames: int, words: Callable, first_HWC: np.ndarray | None) -> Verb:
    """So many frames, by windows, at the request's size."""
    size_HW, whole = request.size_THW[1:], dataclasses.replace(request, prompt=words(0))
    latent_frames = 1 + -(-(frames - 1) // generator.codec.config.time_factor)
    begins = words(frames - 1) == words(0) and latent_frames <= generator.window  # is all of it one window
    window = _frames(generator, latent_frames if begins else generator.window)
    first = dataclasses.replace(whole, size_THW=(window, *size_HW))
    if first_HWC is None:
        latents = yield first
    else:
        known = yield Encode(resized(first_HWC[None], size_HW))
        latents = yield from _given(generator, first, {0: known})
    yield from _windows(generator, whole, generator.codec.decoder(), latents, 0, frames, words)


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
