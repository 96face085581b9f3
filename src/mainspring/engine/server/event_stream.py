"""Server-sent events, as OpenAI streams them."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mainspring.engine.server.disconnect import ClientGoneError, until_disconnect
from mainspring.engine.server.http_errors import mainspring_error_bytes
from mainspring.errors import MainspringError


@dataclass(frozen=True, slots=True)
class NamedEvent:
    """An event with a name of its own. A stream of these ends without `[DONE]`."""

    name: str
    data: bytes


class EventStream(Response):
    """A response of server-sent events: the JSON of each, then `[DONE]`; an error ends it with an error event.

    The generator is closed as soon as the stream ends, also when the client goes away in the middle.
    """

    media_type = "text/event-stream"

    def __init__(
        self, first: bytes | NamedEvent, rest: AsyncGenerator[bytes, None] | AsyncGenerator[NamedEvent, None]
    ) -> None:
        # X-Accel-Buffering keeps nginx from holding events back.
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._rest = rest

    @classmethod
    async def start(
        cls, request: Request, events: AsyncGenerator[bytes, None] | AsyncGenerator[NamedEvent, None]
    ) -> EventStream:
        """Waits for the first event, so that what fails before it is answered with its own HTTP status."""
        return cls(await until_disconnect(request.receive, _next(events)), events)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Who has gone needs no answer, and the stream has released what it held.
        with suppress(ClientGoneError):
            await until_disconnect(receive, self._stream(send))

    async def _stream(self, send: Send) -> None:
        async with aclosing(self._rest) as events:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send(_event(self._first))
            try:
                async for event in events:
                    await send(_event(event))
                if not isinstance(self._first, NamedEvent):
                    await send(_event(b"[DONE]"))
            except MainspringError as error:
                await send(_event(mainspring_error_bytes(error)))
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _next(
    events: AsyncGenerator[bytes, None] | AsyncGenerator[NamedEvent, None],
) -> bytes | NamedEvent:
    return await anext(events)


def _event(event: bytes | NamedEvent) -> dict[str, Any]:
    data = (
        b"data: " + event
        if isinstance(event, bytes)
        else b"event: %s\ndata: %s" % (event.name.encode(), event.data)
    )
    return {"type": "http.response.body", "body": data + b"\n\n", "more_body": True}
