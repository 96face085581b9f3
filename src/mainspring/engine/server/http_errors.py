"""OpenAI's error shape for everything that goes wrong: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from mainspring.engine.server.disconnect import ClientGoneError
from mainspring.errors import (
    ChatTemplateError,
    CheckpointError,
    ConfigError,
    EngineDeadError,
    InvalidRequestError,
    MainspringError,
    ModelNotFoundError,
    RequestTooLongError,
    TokenizerError,
)

log = logging.getLogger(__name__)

INVALID_REQUEST = "invalid_request_error"
AUTHENTICATION = "authentication_error"
NOT_FOUND = "not_found_error"
PERMISSION = "permission_error"
UNAVAILABLE = "service_unavailable_error"
SERVER_ERROR = "server_error"

_TYPE_OF_STATUS = {
    401: AUTHENTICATION,
    403: PERMISSION,
    404: NOT_FOUND,
    500: SERVER_ERROR,
    503: UNAVAILABLE,
}


class ErrorDetail(msgspec.Struct):
    """The inner object of OpenAI's error shape."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct):
    """OpenAI's error shape."""

    error: ErrorDetail


def error_bytes(status: int, message: str, *, param: str | None = None, code: str | None = None) -> bytes:
    """The JSON of an error; its `type` follows from the HTTP status."""
    kind = _TYPE_OF_STATUS.get(status, INVALID_REQUEST)
    return msgspec.json.encode(ErrorBody(ErrorDetail(message, kind, param, code)))


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """An HTTP response in OpenAI's error shape."""
    body = error_bytes(status, message, param=param, code=code)
    return Response(body, status, dict(headers) if headers else None, media_type="application/json")


def describe(error: MainspringError) -> tuple[int, str | None, str | None]:
    """HTTP status, `param` and `code` of one of our own errors."""
    match error:
        case RequestTooLongError():
            return 400, error.param, "context_length_exceeded"
        case InvalidRequestError():
            return 400, error.param, "invalid_value" if error.param else None
        case ModelNotFoundError():
            return 404, "model", "model_not_found"
        case ChatTemplateError():
            return 400, "messages", "chat_template_error"
        case TokenizerError():
            return 400, None, "tokenizer_error"
        case CheckpointError() | ConfigError():
            return 400, None, "invalid_value"
        case EngineDeadError():
            return 503, None, "engine_dead"
        case _:
            return 500, None, None


def mainspring_error_bytes(error: MainspringError) -> bytes:
    """The JSON of one of our own errors: the body of a response, or an event of a stream under way."""
    status, param, code = describe(error)
    return error_bytes(status, str(error), param=param, code=code)


def install_error_handlers(app: FastAPI) -> None:
    """Answers every exception that a route can raise in OpenAI's error shape."""
    # FastAPI's annotation of add_exception_handler admits only handlers of the bare Exception.
    handlers: dict[type[Exception], Any] = {
        MainspringError: _on_mainspring_error,
        RequestValidationError: _on_validation_error,
        HTTPException: _on_http_exception,
        ClientGoneError: _on_client_gone,
        Exception: _on_unexpected_error,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)


async def _on_mainspring_error(request: Request, error: MainspringError) -> Response:
    status, param, code = describe(error)
    return error_response(status, str(error), param=param, code=code)


async def _on_validation_error(request: Request, error: RequestValidationError) -> Response:
    message, param, code = _explain(error.errors(), _fields_of(request))
    return error_response(400, message, param=param, code=code)


async def _on_http_exception(request: Request, error: HTTPException) -> Response:
    message, code = str(error.detail), None
    if error.status_code == 404:
        message, code = f"There is no route {request.method} {request.url.path}.", "route_not_found"
    elif error.status_code == 405:
        message, code = f"{request.url.path} does not take {request.method}.", "method_not_allowed"
    elif error.status_code == 400:
        message, code = "The body cannot be read as JSON.", "invalid_json"
    elif error.status_code == 413:
        code = "body_too_large"
    return error_response(error.status_code, message, code=code, headers=error.headers)


async def _on_client_gone(request: Request, error: ClientGoneError) -> Response:
    # Nobody reads this; 499 is what nginx logs in such a case.
    return Response(status_code=499)


async def _on_unexpected_error(request: Request, error: Exception) -> Response:
    # Starlette raises the error again after this answer, and uvicorn logs its traceback.
    return error_response(
        500, f"Internal error ({type(error).__name__}); the server's log has the traceback."
    )


def _fields_of(request: Request) -> list[str]:
    """The names that the body of this request's route may have."""
    route = request.scope.get("route")
    body = route.body_field if isinstance(route, APIRoute) else None
    kind = None if body is None else body.field_info.annotation
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []


def _explain(
    errors: Sequence[Mapping[str, Any]], fields: Sequence[str]
) -> tuple[str, str | None, str | None]:
    """Message, `param` and `code` of the first of pydantic's errors; the message counts the others."""
    first = errors[0]
    # The location is ("body", field, index or union member...); an empty one is the body as a whole.
    # A member of a union is named by its type, which is no name in the body.
    path = [str(part) for part in first["loc"][1:] if re.fullmatch(r"[a-z0-9_]+", str(part))]
    kind = first["type"]
    if kind == "json_invalid":
        where = first["loc"][-1]
        return f"The body is not valid JSON: {first['ctx']['error']} at byte {where}.", None, "invalid_json"
    if not path:
        return (
            "The body must be a JSON object, sent with the header Content-Type: application/json.",
            None,
            "invalid_json",
        )
    param = ".".join(path)
    if kind == "extra_forbidden":
        message = f"Unrecognized request argument supplied: {param}."
        known = fields if len(path) == 1 else []
        if near := difflib.get_close_matches(param, known, n=1):
            message += f" Did you mean {near[0]!r}?"
        return message, param, "unknown_parameter"
    message = f"{param}: {first['msg'].removeprefix('Value error, ')}."
    if len(errors) > 1:
        message += f" ({len(errors) - 1} more of this kind.)"
    missing = kind == "missing"
    return message, param, "missing_required_parameter" if missing else "invalid_type"
