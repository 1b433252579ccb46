"""The page on a real server, for tests that speak to it as a browser or as a stranger would."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minisora_jax.bundled import CODEC, MODEL
from minisora_jax.generate import VideoPipeline
from minisora_jax.ui.server import application


@contextlib.contextmanager
def served(out: Path) -> Iterator[int]:
    """The port of a server on this machine, whose results go to `out`."""
    pipeline = VideoPipeline.load(MODEL, CODEC)
    model = {"model": None, "hash": pipeline.hash, "codec_hash": pipeline.codec.hash, "mesh": None}
    app, queue = application(pipeline, out, model)
    with running(app) as port:
        yield port
        queue.close()


@contextlib.contextmanager
def running(app: Any) -> Iterator[int]:
    """The port of a server of an ASGI application on this machine."""
    import uvicorn

    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    quick = {"log_level": "error", "timeout_graceful_shutdown": 1}
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, **quick))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield port
    server.should_exit = True
    thread.join(timeout=10)
