"""Captions by a model that looks: better ones than the web's make a better generator (DALL-E 3; Betker et al. 2023,
"Improving Image Generation with Better Captions").

A captioner answers an instruction about some frames in words. `open_captioner` tells by the spelling which it is:

    http://localhost:8000/v1#MODEL         an OpenAI-compatible endpoint, such as vLLM's (curation/endpoint.py)
    FILE.py:FUNCTION, or package.module:function     str = function(instruction, frames uint8 (n, H, W, 3))
    Qwen/Qwen2.5-VL-3B-Instruct, or a path           a vision-language model of `transformers` (curation/vlm.py)

Each clip gets a short and a long caption, which are kept beside its original one; which of them a model is trained on
is chosen when the data set is read (`choose`): DALL-E 3 took the long one of 95 % of the samples and the original of
the others. A user's prompt is short, so `expand` writes it as such a long caption with the same models.
"""

from __future__ import annotations

import functools
import hashlib
import re
from typing import Protocol

import numpy as np

from minisora_jax.curation.endpoint import CaptionRefused, Endpoint
from minisora_jax.curation.filters import load_function

FRAMES = 8  # shown to the captioner, evenly spaced

SHORT = (
    "These are frames of one video, in order. Say in one plain sentence of at most fifteen words what it shows: the "
    "main subject and what it does. Answer with the sentence alone."
)
PARAGRAPH = (
    "in one paragraph of four to six sentences: the subjects and how they look, what they do and how it goes on over "
    "time, the surroundings, the movement of the camera, light, colours and style."
)
LONG = (
    f"These are frames of one video, in order. Describe the video {PARAGRAPH} Say only what can be seen, do not guess "
    "names, and do not speak of frames. Answer with the paragraph alone."
)
EXPAND = (
    "A model makes videos from descriptions. Write the following request as a description of a finished video, "
    f"{PARAGRAPH} Keep all that the request says, add only what goes with it, and answer with the paragraph alone.\n\n"
    "Request: "
)


class Captioner(Protocol):
    identity: str  # the model, and what it is asked: a data set remembers it
    processes: int | None  # how many copies one machine takes in a local run; None: as many as there are workers

    def check(self) -> None:
        """Is it there? Errors say how to mend it."""

    def ask(self, instruction: str, frames_nHWC: np.ndarray | None = None) -> str:
        """Its answer. Refused where it gives none; RuntimeError where it cannot be reached."""


def describe(captioner: Captioner, frames_THWC: np.ndarray) -> dict[str, str]:
    """{"short": one sentence, "long": a paragraph} of a clip, uint8 RGB; Refused where one is missing."""
    T = len(frames_THWC)
    shown = frames_THWC[np.unique(np.linspace(0, T - 1, min(FRAMES, T)).round().astype(int))]
    return {kind: _clean(captioner.ask(said, shown)) for kind, said in (("short", SHORT), ("long", LONG))}


def expand(prompt: str, captioner: Captioner) -> str:
    """A user's short prompt as a long caption, as the model has learned them."""
    if not prompt.strip():
        raise ValueError("the prompt is empty; for example 'a cat on a skateboard'")
    return _clean(captioner.ask(EXPAND + prompt))


@functools.lru_cache(maxsize=1)
def open_captioner(spec: str) -> Captioner:
    """The captioner of that spelling, once a process."""
    if re.match(r"https?://", spec):
        return Endpoint(spec, asked=ASKED)
    if re.fullmatch(r"(.+\.py|[\w.]+):\w+", spec):
        return Function(spec)
    from minisora_jax.curation.vlm import VisionLanguageModel

    return VisionLanguageModel(spec, asked=ASKED)


ASKED = hashlib.sha256(f"{SHORT}\n{LONG}\n{FRAMES}".encode()).hexdigest()[:12]  # other instructions, other captions


class Function:
    """A function of the user's own as a captioner."""

    processes = None

    def __init__(self, spec: str):
        self.function = load_function(spec)
        self.identity = f"{spec} asked {ASKED}"

    def check(self) -> None:
        """`load_function` found it."""

    def ask(self, instruction: str, frames_nHWC: np.ndarray | None = None) -> str:
        return self.function(instruction, frames_nHWC)


def _clean(answer: str) -> str:
    """White space as single spaces; Refused for nothing."""
    text = " ".join(answer.split()) if isinstance(answer, str) else ""
    if not text:
        raise CaptionRefused("no caption", f"the captioner answered {answer!r}")
    return text
