"""The page on a port: Gradio's own routes, and one of ours, which hands out results by the names we gave them."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

from minisora_jax.ui.gallery import TYPES, Gallery
from minisora_jax.ui.job_queue import JobQueue
from minisora_jax.ui.uploads import MOST_BYTES


def application(pipeline, out: Path, model: dict):
    """(the ASGI application, its line)."""
    incoming = (out / "incoming").resolve()
    os.environ |= {"GRADIO_TEMP_DIR": str(incoming), "GRADIO_ANALYTICS_ENABLED": "False"}  # read when it is imported
    import gradio as gr
    from fastapi import FastAPI, HTTPException
    from fastapi.responses import FileResponse

    from minisora_jax.ui import page, show

    gallery = Gallery(out)
    line = JobQueue(pipeline, gallery, model)
    app = FastAPI(openapi_url=None)

    @app.get("/made/{asked}")
    def made(asked: str):
        path = gallery.path(asked)
        if path is None:
            raise HTTPException(404, "nothing of that name was made here")
        return FileResponse(path, media_type=TYPES[path.suffix], headers={"X-Content-Type-Options": "nosniff"})

    plain = ["system-ui", "sans-serif"]  # no fonts from elsewhere
    theme = gr.themes.Default(primary_hue="indigo", font=plain, font_mono=["ui-monospace", "monospace"])
    theme = theme.set(block_title_background_fill="none", block_title_text_color="*body_text_color")
    theme = theme.set(block_title_padding="0", block_title_text_weight="600", block_title_text_size="*text_sm")
    blocks = page.build(line, gallery, incoming).queue(default_concurrency_limit=4, max_size=256)
    looks = {"theme": theme, "css": show.CSS, "footer_links": []}
    limits = {"max_file_size": MOST_BYTES, "allowed_paths": [], "show_error": False, "ssr_mode": False}
    app = gr.mount_gradio_app(app, blocks, path="/", **looks, **limits)
    # Of a mounted page Gradio (6.31) does not check that a file which a request names was uploaded: any of this machine
    # would be copied to where it can be fetched. Of a launched one it does.
    blocks.has_launched = True
    return app, line


def serve(pipeline, out: Path, model: dict, host: str, port: int) -> None:
    import uvicorn

    _free(host, port)
    app, line = application(pipeline, out, model)
    print(f"open http://{'localhost' if host == '127.0.0.1' else host}:{port} (results in {out}; Ctrl-C ends it)")
    with contextlib.closing(line):
        uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=3)


def _free(host: str, port: int) -> None:
    """ValueError where somebody else has the port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.closing(socket.socket(family)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(f"port {port} of {host} cannot be had ({error.strerror}): give another --port") from error
