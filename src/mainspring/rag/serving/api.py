"""The HTTP API: `POST /v1/search`, `POST /v1/ask` (a stream of events if wanted), `GET /health`, MCP at /mcp."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import iterate_in_threadpool

from mainspring.engine.server.keys import AccessKeys, KeyCheck
from mainspring.errors import ConfigError, EmptyCorpusError, MainspringError
from mainspring.rag.pipeline import Answer, Delta, Event
from mainspring.rag.serving.live import LivePipeline
from mainspring.rag.serving.mcp_server import mcp_server
from mainspring.rag.serving.wire import answer_value, citation_value, passage_value
from mainspring.rag.stores.store import Condition

MAX_QUESTION = 4000  # characters


class _Question(BaseModel):
    model_config = ConfigDict(extra="forbid")
    question: str = Field(min_length=1, max_length=MAX_QUESTION)
    where: list[str] = Field(default_factory=list, max_length=16, description="FIELD=VALUE or FIELD^=START")


class SearchRequest(_Question):
    """What to look for, and how many passages are wanted."""

    k: int = Field(default=10, ge=1, le=100)


class AskRequest(_Question):
    """What to answer; `stream` sends `delta`, `citation` and at last `answer` events."""

    stream: bool = False


def make_app(live: LivePipeline, host: str = "127.0.0.1", api_keys: Sequence[str] = ()) -> FastAPI:
    """The application, to be served on `host`: on a loopback address MCP refuses requests made for another name.

    With `api_keys` every route but /health, MCP's too, wants one of them as `Authorization: Bearer KEY`.
    User errors answer 400 (404 for an empty index, 502 for a model that fails).
    """
    tools = mcp_server(live)
    tool_app = tools.streamable_http_app(
        streamable_http_path="/mcp", stateless_http=True, json_response=True, host=host
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with tools.session_manager.run():
            yield

    app = FastAPI(title="Mainspring retrieval", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(KeyCheck, keys=AccessKeys(api=tuple(api_keys)))

    @app.exception_handler(MainspringError)
    async def refuse(_: Request, error: MainspringError) -> JSONResponse:
        status = (
            404 if isinstance(error, EmptyCorpusError) else 400 if isinstance(error, ConfigError) else 502
        )
        return JSONResponse({"error": {"type": type(error).__name__, "message": str(error)}}, status)

    @app.get("/health")
    def health() -> dict[str, Any]:
        pipeline = live.current()
        return {"chunks": len(pipeline.parts.lexical), "embedder": pipeline.parts.embedder.name}

    @app.post("/v1/search")
    def search(request: SearchRequest) -> dict[str, Any]:
        found = live.current().search(
            request.question, request.k, [Condition.parse(w) for w in request.where]
        )
        return {"passages": [passage_value(n, passage) for n, passage in enumerate(found, 1)]}

    @app.post("/v1/ask", response_model=None)
    def ask(request: AskRequest) -> StreamingResponse | dict[str, Any]:
        where = [Condition.parse(text) for text in request.where]
        pipeline = live.current()
        if not request.stream:
            return answer_value(pipeline.answer(request.question, where))
        events = pipeline.ask(request.question, where)
        first = next(events)  # what is wrong with the request is an answer with a status, not an event
        return StreamingResponse(iterate_in_threadpool(_sse(first, events)), media_type="text/event-stream")

    app.mount("/", tool_app)
    return app


def _sse(first: Event, rest: Iterator[Event]) -> Iterator[str]:
    """Server-sent events; a failure after the first is an `error` event, the last."""
    try:
        yield _event(first)
        for event in rest:
            yield _event(event)
    except MainspringError as error:
        yield _frame("error", {"type": type(error).__name__, "message": str(error)})


def _event(event: Event) -> str:
    if isinstance(event, Delta):
        return _frame("delta", {"text": event.text})
    if isinstance(event, Answer):
        return _frame("answer", answer_value(event))
    return _frame("citation", citation_value(event))


def _frame(name: str, value: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(value, ensure_ascii=False)}\n\n"
