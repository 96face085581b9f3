"""Puts the console on an application: its page at `/`, its files and live figures under `/console/`."""

from __future__ import annotations

import hashlib
import mimetypes
import time
from importlib.resources import files
from typing import TYPE_CHECKING

import msgspec
from fastapi import APIRouter, FastAPI, Request, Response

if TYPE_CHECKING:
    from mainspring.engine.server.async_llm import AsyncLLM

# The page may load its own files and talk to its own server; nothing else, and nobody may frame it.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "manifest-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
_MEDIA_TYPES = {".js": "text/javascript", ".svg": "image/svg+xml"}


class LiveFigures(msgspec.Struct):
    """What the page shows beside the chat. `seconds` is a monotonic clock, for rates between two answers."""

    model: str
    max_model_len: int
    engine_dead: str | None
    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks_total: int
    block_size: int
    prompt_tokens_total: int
    generation_tokens_total: int
    seconds: float


class _File(msgspec.Struct, frozen=True):
    content: bytes
    media_type: str
    etag: str


def mount_console(app: FastAPI, llm: AsyncLLM) -> None:
    """Adds the console's routes. Its files are read once, here; no other path can be asked for."""
    pages = _read_files()
    router = APIRouter(include_in_schema=False)

    def answer(request: Request, page: _File) -> Response:
        headers = {**HEADERS, "ETag": page.etag}
        if request.headers.get("if-none-match") == page.etag:
            return Response(status_code=304, headers=headers)
        return Response(page.content, media_type=page.media_type, headers=headers)

    @router.get("/")
    async def index(request: Request) -> Response:
        return answer(request, pages["index.html"])

    @router.get("/favicon.ico")
    async def favicon(request: Request) -> Response:
        return answer(request, pages["icon.svg"])

    @router.get("/console/stats")
    async def stats() -> Response:
        content = msgspec.json.encode(_figures(llm))
        return Response(content, media_type="application/json", headers={"Cache-Control": "no-store"})

    for name, page in pages.items():
        # The default binds this page; the loop's variable will be another one when the route runs.
        async def static(request: Request, page: _File = page) -> Response:
            return answer(request, page)

        router.add_route(f"/console/{name}", static, methods=["GET"])
    app.include_router(router)


def console_files() -> frozenset[str]:
    """The paths of the page and its files, which hold no secret: what anybody may load, keys or not."""
    names = (entry.name for entry in files("mainspring.console").joinpath("static").iterdir())
    return frozenset({"/", "/favicon.ico", *(f"/console/{name}" for name in names)})


def _read_files() -> dict[str, _File]:
    found: dict[str, _File] = {}
    for entry in files("mainspring.console").joinpath("static").iterdir():
        content = entry.read_bytes()
        suffix = "." + entry.name.rpartition(".")[2]
        media_type = _MEDIA_TYPES.get(suffix) or mimetypes.types_map[suffix]
        found[entry.name] = _File(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return found


def _figures(llm: AsyncLLM) -> LiveFigures:
    stats = llm.stats
    return LiveFigures(
        model=llm.metrics.model_name,
        max_model_len=llm.limits.max_model_len,
        engine_dead=None if llm.dead is None else str(llm.dead),
        running=stats.running,
        waiting=stats.waiting,
        kv_blocks_used=stats.kv_blocks_used,
        kv_blocks_total=stats.kv_blocks_total,
        block_size=stats.block_size,
        prompt_tokens_total=stats.prompt_tokens_total,
        generation_tokens_total=stats.generation_tokens_total,
        seconds=time.monotonic(),
    )
