"""What the routes share: the engine, the name under which the model is served, and how an answer begins."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field

import msgspec
from fastapi import Request, Response

from mainspring.engine.server.async_llm import AsyncLLM
from mainspring.engine.server.middleware import DrainGate
from mainspring.errors import InvalidRequestError, ModelNotFoundError

# One body may ask for that many texts: prompts times choices.
MAX_TEXTS = 1024


@dataclass(frozen=True, slots=True)
class Service:
    """Set once on `app.state.service`. `created`: when the model was loaded, in seconds since 1970."""

    llm: AsyncLLM
    model_name: str
    gate: DrainGate
    created: int = field(default_factory=lambda: int(time.time()))

    def check_model(self, name: str | None) -> None:
        """Refuses a model that is not served here; none means the one that is."""
        if name is not None and name != self.model_name:
            raise ModelNotFoundError(f"There is no model {name!r} here; this server has {self.model_name!r}.")


def service_of(request: Request) -> Service:
    """The service of the app that this request came to."""
    service = request.app.state.service
    if not isinstance(service, Service):
        raise TypeError("app.state.service is not set")
    return service


def check_texts(prompts: int, n: int) -> None:
    """Refuses a body that asks for too many texts."""
    if prompts * n > MAX_TEXTS:
        raise InvalidRequestError(
            f"{prompts} prompts with n={n} ask for {prompts * n} texts; at most {MAX_TEXTS} go in one request",
            "n",
        )


def new_id(prefix: str) -> str:
    """A fresh id such as `cmpl-1f...`."""
    return f"{prefix}-{uuid.uuid4().hex}"


def json_response(answer: msgspec.Struct) -> Response:
    """A struct as the body of a response."""
    return Response(msgspec.json.encode(answer), media_type="application/json")
