"""Serve the page on a port: Gradio's routes, and a route that serves results by their generated names."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from minisora_jax.generate.pipeline import VideoPipeline
from minisora_jax.io.filesystem import printable
from minisora_jax.io.lock import only_writer
from minisora_jax.io.retry import DataError
from minisora_jax.ui.conversions import Conversions
from minisora_jax.ui.gallery import TYPES, Gallery
from minisora_jax.ui.guard import Guard, Names
from minisora_jax.ui.incoming import EXAMPLES, Incoming
from minisora_jax.ui.job_queue import JobQueue
from minisora_jax.ui.uploads import MOST_BYTES, InvalidInput

if TYPE_CHECKING:
    from fastapi import FastAPI


def application(
    pipeline: VideoPipeline, out: Path, model: dict, names: Names | None = None
) -> tuple[FastAPI, JobQueue]:
    """(the ASGI application, its queue).

    Args:
        out: the folder of results and uploads.
        model: the model's entry of the records, see jobs/output.py.
        names: the names by which the page may be called; those of this machine alone by default.
    """
    sent = (out / "incoming").resolve()
    # Gradio reads these variables when it is imported.
    os.environ |= {"GRADIO_TEMP_DIR": str(sent), "GRADIO_ANALYTICS_ENABLED": "False"}
    import gradio as gr
    from fastapi import FastAPI, HTTPException
    from fastapi.responses import FileResponse
    from gradio.themes import Default

    from minisora_jax.ui import page, show

    gallery = Gallery(out)
    queue, conversions, incoming = JobQueue(pipeline, gallery, model), Conversions(), Incoming(sent, gallery)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI):
        async with incoming.sweeping():
            yield
        conversions.close()

    app = FastAPI(openapi_url=None, lifespan=lifespan)

    @app.get("/results/{file}")
    async def result(file: str):
        if (found := gallery.path(file)) is None:
            raise HTTPException(404, "there is no result of this name")
        video, path = found
        try:
            if not path.is_file():
                await conversions.converted(video, path)
        except InvalidInput as full:
            raise HTTPException(503, str(full), {"Retry-After": "60"}) from full
        except (ValueError, OSError, DataError) as error:
            raise HTTPException(404, "this result is damaged or deleted") from error
        return FileResponse(path, media_type=TYPES[path.suffix], headers={"X-Content-Type-Options": "nosniff"})

    plain = ["system-ui", "sans-serif"]  # no downloaded fonts
    theme = Default(primary_hue="indigo", font=plain, font_mono=["ui-monospace", "monospace"])
    theme = theme.set(block_title_background_fill="none", block_title_text_color="*body_text_color")
    theme = theme.set(block_title_padding="0", block_title_text_weight="600", block_title_text_size="*text_sm")
    blocks = page.build(queue, gallery, sent, sent / EXAMPLES).queue(default_concurrency_limit=4, max_size=256)
    looks = {"theme": theme, "css": show.CSS, "footer_links": []}
    limits = {"max_file_size": MOST_BYTES, "allowed_paths": [], "show_error": False, "ssr_mode": False}
    app = gr.mount_gradio_app(app, blocks, path="/", **looks, **limits)
    # Gradio (6.31) checks that a file which a request names was uploaded only if the page is launched. Of a mounted
    # page it would copy any file of this machine to a place where it can be fetched.
    blocks.has_launched = True
    app.add_middleware(Guard, names=names or Names(), incoming=incoming)
    return app, queue


class Printable(io.TextIOBase):
    """A stream for tracebacks of Gradio's, which show what visitors send: no control code reaches the terminal."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str, /) -> int:
        return self.stream.write(printable(text, keep="\r\n\t"))

    def flush(self) -> None:
        self.stream.flush()

    def isatty(self) -> bool:
        return self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()


def serve(
    pipeline: VideoPipeline, out: Path, model: dict, host: str, port: int, further_names: Sequence[str] = ()
) -> None:
    """Serve the page until Ctrl-C.

    Args:
        further_names: names by which the page may be called beside those that follow from `host`.

    Raises:
        ValueError: the port is not available.
        Busy: another page or a batch writes to `out`, where this page would delete what it has not made.
    """
    import uvicorn

    require_free(host, port)
    streams = contextlib.redirect_stderr(Printable(sys.stderr)), contextlib.redirect_stdout(Printable(sys.stdout))
    with only_writer(out, "minisora ui"):
        app, queue = application(pipeline, out, model, Names(host, further_names))
        print(f"open http://{'localhost' if host == '127.0.0.1' else host}:{port} (results in {out}; stop with Ctrl-C)")
        with contextlib.closing(queue), streams[0], streams[1]:
            uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=3)


def require_free(host: str, port: int) -> None:
    """Raise ValueError if a server cannot listen at the port: it is in use, or not allowed."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.closing(socket.socket(family)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"port {port} of {host} is not available ({reason}): set another --port") from error
