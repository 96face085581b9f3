"""The parts of a server put together: tokenizer, engine, and the application on them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mainspring.engine.server.protocol import Load, Ready
from mainspring.engine.server.settings import ServerSettings
from mainspring.engine.server.supervisor import EngineSupervisor
from mainspring.errors import ChatTemplateError, ConfigError
from mainspring.formats.named_models import gguf_source

if TYPE_CHECKING:
    from fastapi import FastAPI

    from mainspring.engine.server.async_llm import AsyncLLM
    from mainspring.engine.server.middleware import DrainGate
    from mainspring.formats.tokenizer import Tokenizer

# Adds routes to an application.
Extend = Callable[["FastAPI", "AsyncLLM"], None]


def load_message(settings: ServerSettings, path: Path) -> Load:
    """What the engine is told to load. Raises ModelNotFoundError if quantised weights are wanted of no GGUF file."""
    return Load(
        model=str(path),
        device=settings.device,
        dtype=settings.dtype,
        numerics=settings.numerics,
        config=settings.engine,
        num_threads=settings.num_threads,
        quantized=str(gguf_source(settings.model)) if settings.quantized else None,
        layout=settings.layout,
    )


def read_template(path: str | None) -> str | None:
    """The source of a chat template. Raises ConfigError."""
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The chat template {path!r} cannot be read: {error}") from error


def read_tokenizer(settings: ServerSettings, path: Path, template: str | None) -> Tokenizer:
    """The model's tokenizer; `template` takes the place of its chat template. Raises TokenizerError."""
    from mainspring.formats.tokenizer import Tokenizer

    return Tokenizer.from_directory(path, chat_template=template, template_seconds=settings.template_seconds)


def start_template(tokenizer: Tokenizer) -> None:
    """Starts the chat template's process, so that the first request need not wait for it."""
    # A template may refuse this conversation, and a model may have none; requests will be told.
    with contextlib.suppress(ChatTemplateError):
        tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}])


def assemble(
    settings: ServerSettings,
    extend: Extend | None,
    supervisor: EngineSupervisor,
    ready: Ready,
    tokenizer: Tokenizer,
    name: str,
) -> tuple[DrainGate, AsyncLLM, FastAPI]:
    """The engine's asynchronous face, and the routes on it."""
    from mainspring.engine.server.app import create_app
    from mainspring.engine.server.async_llm import AsyncLLM
    from mainspring.engine.server.keys import AccessKeys
    from mainspring.engine.server.metrics import Metrics
    from mainspring.engine.server.middleware import LOOPBACK_NAMES, DrainGate, is_loopback
    from mainspring.engine.server.service import Service, ServiceLimits
    from mainspring.engine.server.tool_calls.formats import detect

    form = detect(tokenizer.chat_template, settings.tool_parser, settings.reasoning_parser)
    llm = AsyncLLM(supervisor.engine, ready, tokenizer, tokenizer.eos_token_ids, Metrics(name, ready.stats))
    gate = DrainGate()
    hosts: set[str] = set(settings.allowed_hosts)
    if hosts or is_loopback(settings.host):
        hosts |= {*LOOPBACK_NAMES, settings.host}
    service = Service(
        llm,
        name,
        gate,
        form,
        settings.pooling,
        tuple(settings.engine.lora_adapters or ()),
        ServiceLimits(max_choices=settings.max_choices),
    )
    app = create_app(
        service,
        max_body_bytes=settings.max_body_bytes,
        allowed_hosts=hosts,
        keys=AccessKeys(settings.api_keys, settings.admin_keys, settings.open_paths),
    )
    if extend is not None:
        extend(app, llm)
    return gate, llm, app
