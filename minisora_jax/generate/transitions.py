"""Transitions from one video to another, and loops: frames between a past and a future that are known.

The model makes the latent frames between the end of one video and the beginning of another. A loop is a video that is
followed by a transition back to its own beginning.
"""

from __future__ import annotations

import dataclasses
import logging

import numpy as np

from minisora_jax.generate.frame_ops import (
    colour_distance,
    colour_drift,
    eased,
    evened,
    first_frames,
    jump,
    last_frames,
)
from minisora_jax.generate.known import leads_over
from minisora_jax.generate.native import NativePipeline
from minisora_jax.generate.request import Given, Request
from minisora_jax.generate.runner import Decode, Encode, Note, Task, collected
from minisora_jax.generate.windows import frames_of, window_request, windowed, with_known

log = logging.getLogger("minisora")

SETTLE_STRENGTH = 0.6  # of the second pass, which knows what the second video looks like with a past
GUIDED = 0.25  # share of the guidance: its words say how each video moves, not what leads from one to the other
# The new frames are made up to TRIES times, until no step is above SEAMLESS usual steps and no frame's colours drift by
# more than STEADY. Of 192 tries, 90 % of those without ghosts drift by less than 0.0064, and 90 % of the others by more
# than 0.0094.
TRIES, SEAMLESS, STEADY = 6, 1.5, 0.008
UNLIKE = 0.2  # two scenes differ if the colours of their frames are so far apart
CUT = 2.0  # a step of more usual steps is a cut


def loop_frames(pipeline: NativePipeline, request: Request) -> Task:
    """Returns the frames of a loop from words: a video, and the way from its end back to its beginning."""
    factor = pipeline.codec.config.time_factor
    latent_frames = pipeline.grid(request)[0]  # of the loop: each stands for `factor` frames
    back = min(max(latent_frames // 2, 1), max(pipeline.window - 2, 1))
    frames = 1 + factor * (latent_frames - back)
    straight = dataclasses.replace(request, loop=False)
    there = yield from collected(windowed(pipeline, straight, frames, lambda _: request.prompt))
    return np.concatenate((yield from led_back(pipeline, request, there, back)))


def led_back(pipeline: NativePipeline, request: Request, video_THWC: np.ndarray, k: int) -> Task:
    """Returns (the video, eased at both ends; the 4k - 1 frames that lead from its end to its beginning)."""
    new, end, beginning = yield from led_over(pipeline, request, video_THWC, video_THWC, k)
    half = len(video_THWC) // 2
    return np.concatenate([beginning[:half], end[half:]]), new


def led_over(pipeline: NativePipeline, request: Request, a_THWC: np.ndarray, b_THWC: np.ndarray, k: int) -> Task:
    """Returns (the 4k - 1 new frames between a and b, a eased at its end, b eased at its beginning).

    The window has `k` latent frames to make. The last pixel frame of the last one is b's first.
    """
    factor = pipeline.codec.config.time_factor
    room = max(pipeline.window - k, 2)
    n_b = min(room // 2, max((len(b_THWC) - 1) // factor, 1))
    n_a = min(room - n_b, (len(a_THWC) - 1) // factor)
    a, b = last_frames(a_THWC, 1 + n_a, factor), first_frames(b_THWC, n_b, factor)
    b = np.concatenate([b, np.repeat(b[-1:], 1 + factor * n_b - len(b), axis=0)])  # a short one stands still
    past = yield Encode(a)
    future = yield Encode(np.concatenate([np.repeat(b[:1], factor * k, axis=0), b]))
    window = _Window(pipeline, request, past, k, future[1 + k :])
    until, tries = len(a) + factor * k - 1, []

    def good(frames: np.ndarray) -> bool:
        before, after = eased(a, frames[: len(a)], at_end=True), eased(b, frames[until:], at_end=False)
        shown = np.concatenate([before, frames[len(a) : until], after])
        cut, drift = jump(shown, slice(len(a) - 1, until)), colour_drift(shown[len(a) - 1 : until + 1])
        tries.append((cut / SEAMLESS + drift / STEADY, cut, frames))
        return cut <= SEAMLESS and drift <= STEADY

    for number in range(TRIES):
        if good(frames := (yield from window.sampled(number))):
            break
        # Again, now that b has a past: its latents after that past, and the frames that lead to them.
        latents = yield Encode(np.concatenate([a, frames[len(a) : until], b]))
        if good((yield from window.settled(number, latents))):
            break
    _, cut, frames = min(tries, key=lambda each: each[0])
    a_eased = eased(a_THWC, frames[: len(a)], at_end=True)
    b_eased = eased(b_THWC, frames[until : until + len(b_THWC)], at_end=False)
    new = frames[len(a) : until]
    unlike = not leads_over(pipeline.trained) or colour_distance(a[-1], b[0]) > UNLIKE
    if cut > CUT and unlike:
        new = evened(np.concatenate([a_eased[-1:], new, b_eased[:1]]))[1:-1]
        log.warning("the model makes no way from one scene to the other: the new frames fade")
        yield Note({"faded": True})
    return new, a_eased, b_eased


class _Window:
    """The latent frames around a transition: a past, `k` to make, a future.

    If the past has more than a clip's first latent frame, that one is left out: the model then sees a stretch from the
    middle of a video, all of whose latent frames stand for as many frames.
    """

    def __init__(self, pipeline: NativePipeline, request: Request, past: np.ndarray, k: int, future: np.ndarray):
        self.pipeline, self.first = pipeline, past[:1] if len(past) > 1 else past[:0]
        self.known = {0: (seen := past[len(self.first) :]), len(seen) + k: future}
        t = len(seen) + k + len(future)
        middle = len(self.first) > 0
        frames = pipeline.codec.config.time_factor * t if middle else frames_of(pipeline, t)
        self.request = dataclasses.replace(
            request, size_THW=(frames, *request.size_THW[1:]), middle=middle, loop=False, guided=GUIDED
        )

    def sampled(self, number: int) -> Task:
        """Returns the decoded frames of try `number`, from the past's first frame on."""
        latents = yield from with_known(self.pipeline, window_request(self.request, number), self.known)
        return (yield Decode(np.concatenate([self.first, latents])))

    def settled(self, number: int, latents_thwc: np.ndarray) -> Task:
        """Returns the decoded frames of a second pass, which starts near the latents of the whole window."""
        latents = latents_thwc[len(self.first) :]
        known_thw = np.ones(self.pipeline.grid(self.request), bool)
        start, *_, stop = self.known
        known_thw[len(self.known[start]) : stop] = False
        given = Given(latents, known_thw, SETTLE_STRENGTH)
        latents = yield dataclasses.replace(window_request(self.request, number), given=given)
        return (yield Decode(np.concatenate([self.first, latents])))
