"""Captions from vision-language models. Better captions than the web's make a better generator (DALL-E 3; Betker et al.
2023, "Improving Image Generation with Better Captions").

A captioner answers an instruction about frames in words. `open_captioner` opens one by its name:

    http://localhost:8000/v1#MODEL         an OpenAI-compatible endpoint, such as vLLM's (curation/endpoint.py)
    FILE.py:FUNCTION, or package.module:function     str = function(instruction, frames uint8 (n, H, W, 3))
    Qwen/Qwen2.5-VL-3B-Instruct, or a path           a vision-language model of `transformers` (curation/vlm.py)

Each clip gets a short and a long caption beside its original one. Reading the data set chooses among them
(`sources.clips.choose_caption`): DALL-E 3 trains on the long caption for 95 % of the samples, and on the original for
the others. A user's prompt is short, so `expand` rewrites it as a long caption with the same models.
"""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
from typing import Protocol

import numpy as np

from minisora_jax.curation.endpoint import CaptionRefused, Endpoint
from minisora_jax.io.user_function import load_function

FRAMES = 8  # frames that the captioner gets, evenly spaced
MOST_CHARACTERS = 10_000  # of a caption; a long one has about 600

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
    """A model that answers instructions about frames."""

    @property
    def identity(self) -> str:
        """The model and a hash of the instructions; a data set stores it."""
        ...

    @property
    def processes(self) -> int | None:
        """The number of copies that a local run starts on one machine; None: one for each worker."""
        ...

    def check(self) -> None:
        """Raise an error with the fix if the model is not available."""
        ...

    def ask(self, instruction: str, frames_nHWC: np.ndarray | None = None) -> str:
        """The answer to an instruction about uint8 frames.

        Raises:
            CaptionRefused: the model gives no answer for these frames.
            RuntimeError: the model is unreachable.
        """
        ...


def describe(captioner: Captioner, frames_THWC: np.ndarray) -> dict[str, str]:
    """The captions {"short": one sentence, "long": a paragraph} of a clip of uint8 RGB frames.

    Raises:
        CaptionRefused: the captioner gives no answer, or an empty one.
    """
    T = len(frames_THWC)
    sampled = frames_THWC[np.unique(np.linspace(0, T - 1, min(FRAMES, T)).round().astype(int))]
    return {kind: _clean(captioner.ask(instruction, sampled)) for kind, instruction in INSTRUCTIONS.items()}


def expand(prompt: str, captioner: Captioner) -> str:
    """A user's short prompt, rewritten as a long caption, such as those of the training data."""
    if not prompt.strip():
        raise ValueError("the prompt is empty; write one such as 'a cat on a skateboard'")
    return _clean(captioner.ask(EXPAND + prompt))


@functools.lru_cache(maxsize=1)
def open_captioner(spec: str) -> Captioner:
    """The captioner of a name, opened once a process. The module's docstring lists the names."""
    if re.match(r"https?://", spec):
        return Endpoint(spec, INSTRUCTIONS_HASH)
    if re.fullmatch(r"(.+\.py|[\w.]+):\w+", spec):
        return Function(spec)
    from minisora_jax.curation.vlm import VisionLanguageModel

    return VisionLanguageModel(spec, INSTRUCTIONS_HASH)


INSTRUCTIONS = {"short": SHORT, "long": LONG}
INSTRUCTIONS_HASH = hashlib.sha256(f"{SHORT}\n{LONG}\n{FRAMES}".encode()).hexdigest()[:12]  # part of the identity


class Function:
    """A user's function as a captioner."""

    processes = None

    def __init__(self, spec: str):
        self.function = load_function(spec)
        self.identity = f"{spec} asked {INSTRUCTIONS_HASH}"

    def check(self) -> None:
        """Do nothing: the constructor has loaded the function."""

    def ask(self, instruction: str, frames_nHWC: np.ndarray | None = None) -> str:
        """The function's answer."""
        return self.function(instruction, frames_nHWC)


def _clean(answer: object) -> str:
    """The answer with normalised spaces and without control characters.

    Raises:
        CaptionRefused: it is empty, no text, or longer than `MOST_CHARACTERS`.
    """
    words = " ".join(answer.split()) if isinstance(answer, str) else ""
    text = "".join(c for c in words if unicodedata.category(c) != "Cc")
    if not text:
        raise CaptionRefused("no caption", f"the captioner answered {answer!r}"[:300])
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # a lone surrogate
        raise CaptionRefused("caption not UTF-8", f"the captioner's character {error.start} is no text") from error
    if len(text) > MOST_CHARACTERS:
        raise CaptionRefused("caption too long", f"{len(text)} characters; the limit is {MOST_CHARACTERS}")
    return text
