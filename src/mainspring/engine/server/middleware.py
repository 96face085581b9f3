"""The checks that stand before every route: the Host header, the drain gate, the body's size.

All three are plain ASGI, so that a route still sees its client disconnect.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mainspring.engine.server.http_errors import error_response

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


def is_loopback(host: str) -> bool:
    """Whether this address can be reached from its own machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class HostCheck:
    """Refuses requests whose Host header names none of `allowed`.

    A page on the web can point its own name at 127.0.0.1 (DNS rebinding) and then read what a loopback
    server answers; the Host header is what gives it away. An empty `allowed` turns the check off.
    """

    def __init__(self, app: ASGIApp, allowed: Collection[str]) -> None:
        self.app = app
        self.allowed = frozenset(name.lower() for name in allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.allowed:
            name = _host_name(Headers(scope=scope).get("host", ""))
            if name not in self.allowed:
                names = ", ".join(sorted(self.allowed))
                response = error_response(
                    403,
                    f"The Host header names {name!r}; this server answers to {names} only. "
                    "Start it with --allowed-host to add a name.",
                    code="host_not_allowed",
                )
                await response(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _host_name(header: str) -> str:
    """The name of a Host header without its port and brackets."""
    name = header.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.rpartition(":")[0] if ":" in name else name


class DrainGate:
    """Counts the requests that generate, and refuses new ones once the server drains.

    `drain()` closes the gate; `wait_idle()` returns when the last request under way has been answered.
    """

    def __init__(self) -> None:
        self.draining = False
        self.in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def drain(self) -> None:
        """From now on every new request to generate gets a 503."""
        self.draining = True

    async def wait_idle(self) -> None:
        """Returns when no request to generate is under way."""
        await self._idle.wait()

    def enter(self) -> None:
        """A request begins."""
        self.in_flight += 1
        self._idle.clear()

    def leave(self) -> None:
        """A request has been answered or given up."""
        self.in_flight -= 1
        if self.in_flight == 0:
            self._idle.set()


class DrainMiddleware:
    """Leads every POST (all routes that generate are POST) through a `DrainGate`."""

    def __init__(self, app: ASGIApp, gate: DrainGate) -> None:
        self.app = app
        self.gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        if self.gate.draining:
            response = error_response(
                503,
                "The server is shutting down: it finishes running requests and takes no new ones.",
                code="draining",
                headers={"Retry-After": "5", "Connection": "close"},
            )
            await response(scope, receive, send)
            return
        self.gate.enter()
        try:
            await self.app(scope, receive, send)
        finally:
            self.gate.leave()


class BodyLimit:
    """Refuses bodies of more than `max_bytes` with 413: at once if Content-Length says so, else while reading."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdigit() and int(declared) > self.max_bytes:
            response = error_response(
                413,
                self._message(f"{declared} bytes"),
                code="body_too_large",
                headers={"Connection": "close"},
            )
            await response(scope, receive, send)
            return
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self.max_bytes:
                    # Raised inside the route that reads the body; the error handlers answer it.
                    raise HTTPException(413, self._message("more"), {"Connection": "close"})
            return message

        await self.app(scope, limited, send)

    def _message(self, size: str) -> str:
        return f"The body has {size}; this server reads at most {self.max_bytes} bytes (--max-body-mb)."
