"""What the routes share: the engine, the name under which the model is served, and how an answer begins."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field

import msgspec
from fastapi import Request, Response

from mainspring.engine.messages import Pooling
from mainspring.engine.server.async_llm import AsyncLLM
from mainspring.engine.server.middleware import DrainGate
from mainspring.engine.server.tool_calls.formats import AnswerFormat
from mainspring.errors import InvalidRequestError, ModelNotFoundError

# One body may ask for that many texts: prompts times choices.
MAX_TEXTS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceLimits:
    """What one request may ask for at most. `max_choices`: its `n`."""

    max_choices: int = 128


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A name that requests may give as their model. `lora_id`: the adapter that it stands for, 0 for none."""

    name: str
    lora_id: int = 0


@dataclass(frozen=True, slots=True)
class Service:
    """Set once on `app.state.service`. `created`: when the model was loaded, in seconds since 1970.

    `pooling`: of embeddings, unless a request says otherwise. `adapters`: names of LoRA adapters, in the order of
    their ids, which count from 1.
    """

    llm: AsyncLLM
    model_name: str
    gate: DrainGate
    answer_format: AnswerFormat
    pooling: Pooling = "mean"
    adapters: tuple[str, ...] = ()
    limits: ServiceLimits = field(default_factory=ServiceLimits)
    created: int = field(default_factory=lambda: int(time.time()))

    def check_model(self, name: str | None) -> ServedModel:
        """The model of that name, an adapter or the one that is served; none means the latter.

        Raises: ModelNotFoundError.
        """
        if name is None or name == self.model_name:
            return ServedModel(self.model_name)
        if name in self.adapters:
            return ServedModel(name, 1 + self.adapters.index(name))
        known = ", ".join(repr(known) for known in (self.model_name, *self.adapters))
        raise ModelNotFoundError(f"There is no model {name!r} here; this server has {known}.")

    def check_choices(self, prompts: int, n: int | None) -> int:
        """The number of choices a prompt; refuses a body that asks for too many."""
        choices = 1 if n is None else n
        most = self.limits.max_choices
        if choices > most:
            raise InvalidRequestError(f"n is {choices}, but this server gives at most {most} choices", "n")
        if prompts * choices > MAX_TEXTS:
            raise InvalidRequestError(
                f"{prompts} prompts with n={choices} ask for {prompts * choices} texts; "
                f"at most {MAX_TEXTS} go in one request",
                "n",
            )
        return choices

    def check_template_reads(self, variable: str, param: str | None = None) -> None:
        """Refuses a field (of another name: `param`) that the chat template would not look at."""
        if variable not in (self.llm.tokenizer.chat_template or ""):
            raise InvalidRequestError(
                f"this model's chat template does not read {variable}; leave it out", param or variable
            )


def service_of(request: Request) -> Service:
    """The service of the app that this request came to."""
    service = request.app.state.service
    if not isinstance(service, Service):
        raise TypeError("app.state.service is not set")
    return service


def new_id(prefix: str) -> str:
    """A fresh id such as `cmpl-1f...`."""
    return f"{prefix}-{uuid.uuid4().hex}"


def json_response(answer: msgspec.Struct) -> Response:
    """A struct as the body of a response."""
    return Response(msgspec.json.encode(answer), media_type="application/json")
