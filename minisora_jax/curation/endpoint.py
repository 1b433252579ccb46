"""A captioner behind an OpenAI-compatible endpoint: vLLM, SGLang, llama.cpp, Ollama, or a hosted service.

Frames are sent as JPEGs in data URLs of one `POST URL/chat/completions`. Transient errors (no connection, a time-out,
408, 409, 425, 429, 5xx, a truncated answer) are retried after 1, 2, 4, ... seconds, or after the time that the server
asks for. After the last try the run stops with an error; it can be started again. An error about the clip (400, 413,
415, 422) skips the clip, and so does an answer longer than `MOST_BYTES`. Any other error stops the run at once. A
redirect is such an error: the key would go to whatever host it names.
"""

from __future__ import annotations

import base64
import concurrent.futures
import email.message
import email.utils
import http.client
import io
import json
import logging
import math
import os
import threading
import time
import urllib.error
import urllib.request
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from minisora_jax.io.filesystem import printable

TIMEOUT = 120.0  # seconds for an answer, from the connection to its last byte
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each further try
LONGEST_WAIT = 300.0  # seconds; a longer Retry-After is cut to it
SIDE = 768  # frames are shrunk until the longer side has at most so many pixels
TOKENS = 400  # at most so many tokens an answer
MOST_BYTES = 2**20  # of an answer: 400 tokens take some kilobytes
TRANSIENT, OF_THE_CLIP = (408, 409, 425, 429), (400, 413, 415, 422)  # HTTP codes: retry, skip the clip

log = logging.getLogger("minisora")


class CaptionRefused(ValueError):
    """The captioner gives no caption for this clip, and another try would not help."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail

    def __reduce__(self):
        return CaptionRefused, (self.reason, self.detail)


class Endpoint:
    """A captioner behind a URL. The environment variable OPENAI_API_KEY holds the key, if one is needed.

    Args:
        spec: "http://localhost:8000/v1#MODEL".
        instructions_hash: a hash of the instructions, for the identity.
        timeout: seconds for an answer.
        waits: seconds before each further try.
    """

    processes = None

    def __init__(
        self,
        spec: str,
        instructions_hash: str = "",
        *,
        timeout: float = TIMEOUT,
        waits: tuple[float, ...] = WAITS,
    ):
        self.url, _, self.model = spec.partition("#")
        if not self.model:
            raise ValueError(f"{spec!r} names no model: write URL#MODEL, such as http://localhost:8000/v1#my-model")
        self.url, self.timeout, self.waits = self.url.rstrip("/"), timeout, waits
        # Without the host, so that the same model may move to another host.
        self.identity = f"{self.model} of an endpoint asked {instructions_hash}"

    def check(self) -> None:
        """Send one small request, which shows a wrong URL, model or key, or a model that takes no pictures."""
        try:
            self.ask("What colour is this? Answer with one word.", np.full((1, 64, 64, 3), 128, np.uint8))
        except CaptionRefused as refused:
            raise RuntimeError(
                f"{self.url} refuses a grey test picture ({refused}): does {self.model} take pictures?"
            ) from refused

    def ask(self, instruction: str, frames_nHWC: np.ndarray | None = None) -> str:
        """The model's answer; see `Captioner.ask`."""
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
            raise RuntimeError(f"{self.url} answered {str(answer)[:200]!r}, which is no chat completion") from error
        return text or ""

    def _post(self, body: dict) -> Any:
        """The answer to a request, with the retries of the module's docstring."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        url, began = f"{self.url}/chat/completions", time.monotonic()
        for wait in (*self.waits, None):
            request = urllib.request.Request(url, json.dumps(body).encode("utf-8"), headers)
            try:
                answer = _exchange(request, self.timeout)
                if len(answer.body) > MOST_BYTES:
                    raise CaptionRefused("refused by the captioner", f"an answer of more than {MOST_BYTES} bytes")
                if 200 <= answer.code < 300:
                    return json.loads(answer.body)
                message = f"HTTP {answer.code} {printable(answer.reason)}: {_beginning(answer.body)}"
                if answer.code in OF_THE_CLIP:
                    raise CaptionRefused("refused by the captioner", message)
                if answer.code not in TRANSIENT and answer.code < 500:
                    raise RuntimeError(f"{url} answered {message}. {_advice(answer, self.model)}")
                wait = wait and max(wait, _retry_after(answer.headers.get("Retry-After")))
            except CaptionRefused:
                raise
            except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
                message = printable(f"{type(error).__name__}: {getattr(error, 'reason', error)}")
            if wait is None:
                raise RuntimeError(
                    f"{url} gave no answer in {len(self.waits) + 1} tries over {time.monotonic() - began:.0f} s, each "
                    f"of at most {self.timeout:g} s; the last error: {message}. Run the same command again to go on"
                )
            log.info("%s: %s; next try in %g s", url, message, wait)
            time.sleep(wait)
        raise AssertionError("unreachable: the last wait is None")


class _Answer(NamedTuple):
    code: int
    reason: str
    headers: email.message.Message
    body: bytes  # at most MOST_BYTES + 1


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl) -> None:
        """Follow no redirect: urllib would send the key along, also to another host or from https to http."""


def _exchange(request: urllib.request.Request, seconds: float) -> _Answer:
    """The answer to a request, whatever its code.

    Raises:
        TimeoutError: it is not whole after so many seconds in all. A socket's own time-out is of each read, so that a
            server that sends a byte now and then would never end.
        OSError, http.client.HTTPException: no connection, or half an answer.
    """
    until, result = time.monotonic() + seconds, concurrent.futures.Future[_Answer]()

    def read() -> None:
        try:
            try:
                response = urllib.request.build_opener(_NoRedirect).open(request, timeout=seconds)
            except urllib.error.HTTPError as error:
                response = error
            with response:
                body = b""
                while part := response.read1(min(2**16, MOST_BYTES + 1 - len(body))):
                    body += part
                    if time.monotonic() > until:
                        raise TimeoutError
                length = response.headers.get("Content-Length", "")
                if length.isdecimal() and len(body) < min(int(length), MOST_BYTES + 1):
                    raise http.client.IncompleteRead(body, int(length) - len(body))
                result.set_result(_Answer(response.code, str(response.reason), response.headers, body))
        except BaseException as error:
            result.set_exception(error)

    # A thread, since a server can also be slow with its name, its handshake or its headers, where nothing can be asked.
    threading.Thread(target=read, name="captioner", daemon=True).start()
    try:
        return result.result(seconds)
    except concurrent.futures.TimeoutError as error:
        raise TimeoutError(f"no whole answer within {seconds:g} s") from error


def _data_url(frame_HWC: np.ndarray) -> str:
    image = Image.fromarray(frame_HWC)
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def _beginning(body: bytes) -> str:
    """The beginning of an error's body."""
    return printable(" ".join(body[:2000].decode("utf-8", "replace").split())[:300])


def _retry_after(value: str | None) -> float:
    """The seconds of a Retry-After header, which is a number or a date; at most LONGEST_WAIT."""
    if not value:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return 0.0 if math.isnan(seconds) else min(max(seconds, 0.0), LONGEST_WAIT)


def _advice(answer: _Answer, model: str) -> str:
    if 300 <= answer.code < 400:
        place = printable(str(answer.headers.get("Location", "nowhere"))[:200])
        return f"It sends requests on to {place}, which is not followed, to keep the key: give that URL if you trust it"
    if answer.code in (401, 403):
        return "Set OPENAI_API_KEY to a valid key"
    if answer.code == 404:
        return f"Does the URL end in /v1, and is {model} a model that it serves?"
    return "Check the request and the model; another try does not help"
