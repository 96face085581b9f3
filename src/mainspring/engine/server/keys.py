"""Who may ask: one check before every route, with separate keys for the API and for administration."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from mainspring.engine.server.http_errors import error_response

# Answered without a key, whatever the settings: whether the server is alive is no secret, and what asks for it
# (a load balancer, a supervisor) has no keys.
HEALTH = "/health"
ADMIN_PATHS = frozenset({"/pause", "/resume", "/sleep", "/wake", "/update_weights"})


@dataclass(frozen=True, slots=True)
class AccessKeys:
    """The keys in force.

    Attributes:
        api: any of these opens the API; without one it is open.
        admin: opens the administration's routes; without one they are closed.
        open_paths: paths of files that anybody may load, such as a page that asks for the key.
    """

    api: tuple[str, ...] = ()
    admin: tuple[str, ...] = ()
    open_paths: frozenset[str] = frozenset()


class KeyCheck:
    """Refuses a request whose key is missing or wrong: `Authorization: Bearer KEY`, as OpenAI's clients send it."""

    def __init__(self, app: ASGIApp, keys: AccessKeys) -> None:
        self.app = app
        self.open_paths = keys.open_paths | {HEALTH}
        self.api = [_digest(key) for key in keys.api]
        self.admin = [_digest(key) for key in keys.admin]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = scope["path"]
            response = None
            if path in ADMIN_PATHS:
                if not self.admin:
                    response = error_response(
                        403,
                        f"{path} needs an administration key; start the server with --admin-key.",
                        code="admin_disabled",
                    )
                elif not _admits(self.admin, scope):
                    response = _unauthorized("administration key")
            elif self.api and path not in self.open_paths and not _admits(self.api, scope):
                response = _unauthorized("API key")
            if response is not None:
                await response(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _unauthorized(kind: str) -> Response:
    return error_response(
        401,
        f"This route needs an {kind}: send the header Authorization: Bearer KEY.",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def _admits(digests: Collection[bytes], scope: Scope) -> bool:
    """Whether the request's key is one of these. Takes the same time whichever it is, and however wrong."""
    scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
    given = _digest(key.strip())
    matches = [hmac.compare_digest(given, digest) for digest in digests]
    return scheme.lower() == "bearer" and any(matches)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
