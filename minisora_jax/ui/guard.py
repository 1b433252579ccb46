"""What is looked at of a request before Gradio gets it: the name it is for, the page it comes from, and its size.

The page has no password. A web page that a visitor has open elsewhere must not use it through the visitor's browser:
neither by a request across sites, which says its origin, nor by a name of its own that it lets point to this machine
(DNS rebinding), which is the request's host.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from minisora_jax.io.filesystem import printable
from minisora_jax.ui.incoming import Incoming
from minisora_jax.ui.uploads import MOST_BYTES, InvalidInput

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

MOST_FORM = 2**20  # bytes of a request that is no upload
AROUND = 2**16  # bytes of an upload beside its file


class Names:
    """The names by which the page may be called.

    Args:
        bound: the address at which the server listens. At one of this machine alone, it answers to localhost. Else it
            answers to every address, which no DNS can point elsewhere, and to the machine's name.
        further: names that are allowed too, such as that of a proxy; pages of these names may send requests.
        command: the command that serves the page, for the sentences of refusals.
    """

    def __init__(self, bound: str = "127.0.0.1", further: Sequence[str] = (), command: str = "minisora ui"):
        self.how = f"its owner can allow a name with {command} --allow-host"
        machine = socket.gethostname().lower()
        self.open = not _is_local(bound.lower())
        self.further = {name.lower() for name in further}
        self.allowed = self.further | ({bound.lower(), machine, f"{machine}.local"} if self.open else set())

    def refusal(self, host: str | None, origin: str | None) -> str:
        """The sentence for a request with these headers; "" if it is welcome."""
        name = _name(f"http://{host}")
        if not (_is_local(name) or name in self.allowed or (self.open and _address(name))):
            shown = printable(name)[:100] or "without a name"
            return f"this page does not answer to {shown}: {self.how}"
        if origin is not None and origin.partition("://")[2] != host and _name(origin) not in self.further:
            shown = printable(origin)[:100]
            return f"a page of {shown} may not use this one: {self.how}"
        return ""


def _name(origin: str) -> str:
    """The host's name of an origin, in lower case and without a port; "" for what is no origin."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return ""
    plain = not (parts.username or parts.path or parts.query or parts.fragment) and "\\" not in origin
    return (parts.hostname or "").rstrip(".") if plain else ""


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(name)
    return None


def _is_local(name: str) -> bool:
    address = _address(name)
    return name == "localhost" or name.endswith(".localhost") or bool(address and address.is_loopback)


class Guard:
    """ASGI middleware that refuses requests with a sentence, in plain text.

    Args:
        names: the names by which the page may be called.
        incoming: the room for uploads; None: the page takes none.
    """

    def __init__(self, app: ASGIApp, names: Names, incoming: Incoming | None):
        self.app, self.names, self.incoming = app, names, incoming

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        from starlette.datastructures import Headers
        from starlette.exceptions import HTTPException
        from starlette.responses import PlainTextResponse

        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # the page needs no web sockets
            return await send({"type": "websocket.close", "code": 1008})
        headers = Headers(scope=scope)
        if refusal := self.names.refusal(headers.get("host"), headers.get("origin")):
            return await PlainTextResponse(refusal, 403)(scope, receive, send)
        upload = self.incoming and scope["path"].rstrip("/").endswith("/upload") and scope["method"] == "POST"
        most = MOST_BYTES + AROUND if upload else MOST_FORM
        too_large = f"the request is too large: the limit is {most // 2**20} MiB"
        length = headers.get("content-length", "")
        size = int(length[:20]) if length.isdecimal() else most
        if size > most:
            return await PlainTextResponse(too_large, 413)(scope, receive, send)
        left = most

        async def limited() -> Any:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:  # it did not say its size
                raise HTTPException(413, too_large)
            return message

        try:
            with self.incoming.room(size) if self.incoming and upload else contextlib.nullcontext():
                await self.app(scope, limited, send)
        except InvalidInput as full:
            await PlainTextResponse(str(full), 507)(scope, receive, send)
