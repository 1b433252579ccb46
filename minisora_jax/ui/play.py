"""A world to walk in, served in the browser: the page, and for each visitor a stream of pictures.

    POST /walk           a stream of parts that lasts as long as the walk, each of them
                         u32 bytes of the note | u32 bytes of the picture | note, JSON | picture, JPEG
                         the first note has the walk's token and the world; later ones belong to a picture; the last one
                         may say why the walk is over
    POST /walk/{token}   what the visitor wants from now on (`visitors.Wish`): nothing is answered, or a sentence

A walk goes over two plain requests, so that it needs no package beyond those of the other page, passes through any
proxy, and is guarded like all requests (guard.py). The visitor's place is free as soon as the stream's connection ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisora_jax.generate.world import World
from minisora_jax.ui.controls import keys_of
from minisora_jax.ui.guard import Guard, Names
from minisora_jax.ui.server import Printable, require_free
from minisora_jax.ui.uploads import InvalidInput
from minisora_jax.ui.visitors import MOST_MESSAGE, MOST_VISITORS, Beginning, Visitor, Visitors

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.types import Receive, Send

FILES = {"/": "play.html", "/play.css": "play.css", "/play.js": "play.js"}  # of the page
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
MOST_CONNECTIONS = 64
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; media-src blob:",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",  # a proxy passes pictures on as they come
}


def application(
    world: World,
    begin: Beginning | None = None,
    names: Names | None = None,
    *,
    seed: int = 0,
    most: int = MOST_VISITORS,
) -> tuple[Starlette, Visitors]:
    """(the ASGI application, its visitors).

    Args:
        world: What the visitors walk in.
        begin: Shows a new player the frames of a seed; None: each walk begins with a dream.
        names: The names by which the page may be called; those of this machine alone by default.
        seed: Of the first walk; the next ones count up.
        most: Visitors at one time.
    """
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.responses import PlainTextResponse, Response
    from starlette.routing import Route

    visitors = Visitors(world, begin, seed, most)
    about = {
        "actions": [{"name": name, "keys": keys} for name, keys in keys_of(world.actions).items()],
        "size": world.size_HW,
        "fps": world.fps,
        "caption": world.caption,
    }

    class Walk(Response):
        """The stream of a walk."""

        def __init__(self, visitor: Visitor, wake: asyncio.Event):
            super().__init__(media_type="application/octet-stream", headers=HEADERS)
            del self.headers["content-length"]  # nobody knows it
            self.visitor, self.wake = visitor, wake

        async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            parts = asyncio.create_task(self._send_all(send))
            left = asyncio.create_task(_disconnected(receive))
            try:
                await asyncio.wait({parts, left}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                visitors.leave(self.visitor)
                parts.cancel()
                left.cancel()

        async def _send_all(self, send: Send) -> None:
            first = _part({"token": self.visitor.token, **about})
            await send({"type": "http.response.body", "body": first, "more_body": True})
            async for part in _parts(self.visitor, self.wake):
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

    async def walk(_: Request) -> Response:
        wake, loop = asyncio.Event(), asyncio.get_running_loop()

        def call() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(wake.set)

        try:
            return Walk(visitors.enter(call), wake)
        except InvalidInput as full:
            return PlainTextResponse(str(full), 503, HEADERS)

    async def wish(request: Request) -> Response:
        message = b""
        async for piece in request.stream():
            message += piece
            if len(message) > MOST_MESSAGE:
                return PlainTextResponse(f"a message has at most {MOST_MESSAGE} bytes", 413, HEADERS)
        try:
            visitors.hear(request.path_params["token"], message)
        except KeyError:
            return PlainTextResponse("this walk is over: load the page again to begin another", 404, HEADERS)
        except InvalidInput as refused:
            return PlainTextResponse(str(refused), 400, HEADERS)
        return Response(status_code=204, headers=HEADERS)

    async def page(request: Request) -> Response:
        path = Path(__file__).with_name(FILES[request.url.path])
        return Response(path.read_bytes(), media_type=TYPES[path.suffix], headers=HEADERS)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette):
        yield
        await asyncio.to_thread(visitors.close)

    routes = [Route(path, page) for path in FILES]
    routes += [Route("/walk", walk, methods=["POST"]), Route("/walk/{token}", wish, methods=["POST"])]
    guard = Middleware(Guard, names=names or Names(command="minisora play"), incoming=None)
    return Starlette(routes=routes, middleware=[guard], lifespan=lifespan), visitors


def _part(note: dict[str, Any], picture: bytes = b"") -> bytes:
    text = json.dumps(note).encode()
    return struct.pack(">II", len(text), len(picture)) + text + picture


async def _parts(visitor: Visitor, wake: asyncio.Event) -> AsyncIterator[bytes]:
    """The visitor's pictures as they are made and due, until the walk is over."""
    while not visitor.end:
        wake.clear()
        while visitor.pictures and not visitor.end:
            picture = visitor.pictures.popleft()
            if (early := picture.due - time.monotonic()) > 0:
                await asyncio.sleep(early)
            note = {"frame": picture.frame, "heard": picture.heard, "ms": round(picture.step_ms, 1)}
            yield _part(note, picture.data)
        if not visitor.end:
            await wake.wait()
    yield _part({"end": visitor.end})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def serve(
    world: World,
    begin: Beginning | None,
    host: str,
    port: int,
    further_names: Sequence[str] = (),
    *,
    seed: int = 0,
    most: int = MOST_VISITORS,
) -> None:
    """Serve a world until Ctrl-C.

    Raises:
        ValueError: The port is not available.
    """
    import uvicorn

    require_free(host, port)
    app, visitors = application(world, begin, Names(host, further_names, "minisora play"), seed=seed, most=most)
    print(f"open http://{'localhost' if host == '127.0.0.1' else host}:{port} (stop with Ctrl-C)")
    limits: dict[str, Any] = {"timeout_graceful_shutdown": 3, "limit_concurrency": MOST_CONNECTIONS}
    streams = contextlib.redirect_stderr(Printable(sys.stderr)), contextlib.redirect_stdout(Printable(sys.stdout))
    with contextlib.closing(visitors), streams[0], streams[1]:
        uvicorn.run(app, host=host, port=port, log_level="warning", **limits)
