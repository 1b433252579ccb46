"""A captioner behind an OpenAI-compatible endpoint: vLLM, SGLang, llama.cpp, Ollama, or a hosted service.

Frames go as JPEGs in data URLs of one `POST URL/chat/completions`. What may pass (no connection, a time-out, 408, 409,
425, 429, 5xx, half an answer) is tried again after 1, 2, 4, ... seconds, or as long as the server says; then the run
stops with an error and can be started again. What says that this clip is the trouble (400, 413, 415, 422) costs the
clip. All else stops the run at once.
"""

from __future__ import annotations

import base64
import email.utils
import http.client
import io
import json
import logging
import os
import time
import urllib.error
import urllib.request

import numpy as np
from PIL import Image

TIMEOUT = 120.0  # seconds for an answer
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each further try
LONGEST_WAIT = 300.0  # seconds, whatever the server asks
SIDE = 768  # pixels of the longer side that frames are shrunk to
TOKENS = 400  # of an answer
TRANSIENT, OF_THE_CLIP = (408, 409, 425, 429), (400, 413, 415, 422)

log = logging.getLogger("minisora")


class CaptionRefused(ValueError):
    """The captioner gives no caption for this clip, and asking again would not help."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail

    def __reduce__(self):
        return CaptionRefused, (self.reason, self.detail)


class Endpoint:
    """spec: "http://localhost:8000/v1#MODEL". The key, where one is needed, is the environment's OPENAI_API_KEY."""

    processes = None

    def __init__(self, spec: str, asked: str = "", *, timeout: float = TIMEOUT, waits: tuple[float, ...] = WAITS):
        self.url, _, self.model = spec.partition("#")
        if not self.model:
            raise ValueError(f"{spec!r} names no model: write URL#MODEL, such as http://localhost:8000/v1#my-model")
        self.url, self.timeout, self.waits = self.url.rstrip("/"), timeout, waits
        self.identity = f"{self.model} of an endpoint asked {asked}"  # the same model may move to another host

    def check(self) -> None:
        """One small request, so that a wrong URL, model or key, and a model that takes no pictures, is said at once."""
        try:
            self.ask("What colour is this? Answer with one word.", np.full((1, 64, 64, 3), 128, np.uint8))
        except CaptionRefused as refused:
            raise RuntimeError(
                f"{self.url} refuses a grey test picture ({refused}): does {self.model} take pictures?"
            ) from refused

    def ask(self, instruction: str, frames_nHWC: np.ndarray | None = None) -> str:
        frames = [] if frames_nHWC is None else frames_nHWC
        content = [{"type": "image_url", "image_url": {"url": _data_url(frame)}} for frame in frames]
        answer = self._post(
            {
                "model": self.model,
                "messages": [{"role": "user", "content": [*content, {"type": "text", "text": instruction}]}],
                "max_tokens": TOKENS,
                "temperature": 0,
                "seed": 0,
            }
        )
        try:
            text = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise RuntimeError(f"{self.url} answered {str(answer)[:200]}, which is no chat completion") from error
        return text or ""

    def _post(self, body: dict) -> dict:
        """The answer to a request, tried again as the module says."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        url, began = f"{self.url}/chat/completions", time.monotonic()
        for wait in (*self.waits, None):
            request = urllib.request.Request(url, json.dumps(body).encode("utf-8"), headers)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return json.loads(response.read())
            except urllib.error.HTTPError as error:
                said = f"HTTP {error.code} {error.reason}: {_said(error)}"
                if error.code in OF_THE_CLIP:
                    raise CaptionRefused("refused by the captioner", said) from error
                if error.code not in TRANSIENT and error.code < 500:
                    raise RuntimeError(f"{url} says {said}. {_advice(error.code, self.model)}") from error
                wait = wait and max(wait, _retry_after(error.headers.get("Retry-After")))
            except (OSError, http.client.HTTPException, ValueError) as error:
                said = f"{type(error).__name__}: {getattr(error, 'reason', error)}"
            if wait is None:
                raise RuntimeError(
                    f"{url} gave no answer in {len(self.waits) + 1} tries over {time.monotonic() - began:.0f} s, of "
                    f"{self.timeout:g} s at most each; the last said {said}. Started again, a run goes on from there"
                )
            log.info("%s: %s; again in %g s", url, said, wait)
            time.sleep(wait)


def _data_url(frame_HWC: np.ndarray) -> str:
    image = Image.fromarray(frame_HWC)
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def _said(error: urllib.error.HTTPError) -> str:
    """The first words of an error's body."""
    try:
        return " ".join(error.read(2000).decode("utf-8", "replace").split())[:300]
    except (OSError, http.client.HTTPException):
        return ""


def _retry_after(value: str | None) -> float:
    """Seconds that a server asks to wait, which it says as a number or as a date."""
    if not value:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return 0.0
    return min(max(seconds, 0.0), LONGEST_WAIT)


def _advice(code: int, model: str) -> str:
    if code in (401, 403):
        return "Set OPENAI_API_KEY to a key that it takes"
    if code == 404:
        return f"Is the URL the one that ends in /v1, and is {model} a model that it serves?"
    return "Asking again would not help"
