"""Serve the page on a port: Gradio's routes, and a route that serves results by their generated names."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from minisora_jax.generate.pipeline import VideoPipeline
from minisora_jax.ui.gallery import TYPES, Gallery
from minisora_jax.ui.job_queue import JobQueue
from minisora_jax.ui.uploads import MOST_BYTES

if TYPE_CHECKING:
    from fastapi import FastAPI


def application(pipeline: VideoPipeline, out: Path, model: dict) -> tuple[FastAPI, JobQueue]:
    """(the ASGI application, its queue).

    Args:
        out: the folder of results and uploads.
        model: the model's entry of the records, see jobs/output.py.
    """
    incoming = (out / "incoming").resolve()
    # Gradio reads these variables when it is imported.
    os.environ |= {"GRADIO_TEMP_DIR": str(incoming), "GRADIO_ANALYTICS_ENABLED": "False"}
    import gradio as gr
    from fastapi import FastAPI, HTTPException
    from fastapi.responses import FileResponse
    from gradio.themes import Default

    from minisora_jax.ui import page, show

    gallery = Gallery(out)
    queue = JobQueue(pipeline, gallery, model)
    app = FastAPI(openapi_url=None)

    @app.get("/results/{file}")
    def result(file: str):
        path = gallery.path(file)
        if path is None:
            raise HTTPException(404, "there is no result of this name")
        return FileResponse(path, media_type=TYPES[path.suffix], headers={"X-Content-Type-Options": "nosniff"})

    plain = ["system-ui", "sans-serif"]  # no downloaded fonts
    theme = Default(primary_hue="indigo", font=plain, font_mono=["ui-monospace", "monospace"])
    theme = theme.set(block_title_background_fill="none", block_title_text_color="*body_text_color")
    theme = theme.set(block_title_padding="0", block_title_text_weight="600", block_title_text_size="*text_sm")
    blocks = page.build(queue, gallery, incoming).queue(default_concurrency_limit=4, max_size=256)
    looks = {"theme": theme, "css": show.CSS, "footer_links": []}
    limits = {"max_file_size": MOST_BYTES, "allowed_paths": [], "show_error": False, "ssr_mode": False}
    app = gr.mount_gradio_app(app, blocks, path="/", **looks, **limits)
    # Gradio (6.31) checks that a file which a request names was uploaded only if the page is launched. Of a mounted
    # page it would copy any file of this machine to a place where it can be fetched.
    blocks.has_launched = True
    return app, queue


def serve(pipeline: VideoPipeline, out: Path, model: dict, host: str, port: int) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        ValueError: the port is not available.
    """
    import uvicorn

    _require_free(host, port)
    app, queue = application(pipeline, out, model)
    print(f"open http://{'localhost' if host == '127.0.0.1' else host}:{port} (results in {out}; stop with Ctrl-C)")
    with contextlib.closing(queue):
        uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=3)


def _require_free(host: str, port: int) -> None:
    """Raise ValueError if the port is in use or not allowed."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.closing(socket.socket(family)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"port {port} of {host} is not available ({error.strerror}): set another --port"
            ) from error
