"""The HTTP application: OpenAI's API, health and metrics, behind the checks of `middleware`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from msgspec import UNSET
from starlette.middleware import Middleware

import mainspring
from mainspring.engine.server import admin, chat, completions, embeddings, responses, tokens
from mainspring.engine.server.http_errors import error_response, install_error_handlers
from mainspring.engine.server.keys import AccessKeys, KeyCheck
from mainspring.engine.server.metrics import CONTENT_TYPE
from mainspring.engine.server.middleware import BodyLimit, DrainMiddleware, HostCheck
from mainspring.engine.server.openai_types import ModelCard, ModelList
from mainspring.engine.server.service import Service, json_response, service_of

router = APIRouter()
_ERROR_SCHEMA = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
# What every route may answer, for the OpenAPI document.
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/json": {"schema": _ERROR_SCHEMA}}}
    for status, text in (("4XX", "The request cannot be served."), ("5XX", "The server cannot serve now."))
}
_ROUTES = (chat, completions, responses, embeddings, tokens, admin)


def create_app(
    service: Service, *, max_body_bytes: int, allowed_hosts: Collection[str], keys: AccessKeys
) -> FastAPI:
    """The application. An empty `allowed_hosts` answers to every Host header."""
    app = FastAPI(
        title="Mainspring",
        version=mainspring.__version__,
        # FastAPI's documentation pages load scripts from elsewhere; the schema itself stays.
        docs_url=None,
        redoc_url=None,
        responses=_ERRORS,
        middleware=[
            Middleware(HostCheck, allowed=allowed_hosts),
            Middleware(KeyCheck, keys=keys),
            Middleware(BodyLimit, max_bytes=max_body_bytes),
            Middleware(DrainMiddleware, gate=service.gate),
        ],
    )
    app.state.service = service
    install_error_handlers(app)
    for part in (router, *(module.router for module in _ROUTES)):
        app.include_router(part)
    return app


@router.get("/health")
async def health(request: Request) -> Response:
    """200 while requests are taken; 503 when the engine is dead or the server drains."""
    service = service_of(request)
    if service.llm.dead is not None:
        return error_response(503, str(service.llm.dead), code="engine_dead")
    if service.gate.draining:
        return error_response(503, "The server is shutting down.", code="draining")
    return Response(b'{"status":"ok"}', media_type="application/json")


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    return Response(service_of(request).llm.metrics.render(), media_type=CONTENT_TYPE)


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """The model that is served, and its adapters."""
    service = service_of(request)
    return json_response(
        ModelList([_card(service, name) for name in (service.model_name, *service.adapters)])
    )


# A name may hold slashes.
@router.get("/v1/models/{name:path}")
async def get_model(request: Request, name: str) -> Response:
    """The model of that name."""
    service = service_of(request)
    return json_response(_card(service, service.check_model(name).name))


def _card(service: Service, name: str) -> ModelCard:
    parent = service.model_name if name != service.model_name else UNSET
    return ModelCard(name, service.created, service.llm.limits.max_model_len, parent=parent)
