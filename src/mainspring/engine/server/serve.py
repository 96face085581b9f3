"""Running the server: engine process and HTTP frontend started side by side, drained and ended together."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from mainspring.engine.config import EngineConfig
from mainspring.engine.messages import Pooling
from mainspring.engine.sampling_params import MAX_N
from mainspring.engine.server.protocol import Load, Ready
from mainspring.engine.server.reporter import Reporter
from mainspring.engine.server.supervisor import EngineSupervisor
from mainspring.errors import ChatTemplateError, ConfigError, EngineDeadError

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from mainspring.engine.server.async_llm import AsyncLLM
    from mainspring.engine.server.middleware import DrainGate
    from mainspring.formats.named_models import ResolvedModel
    from mainspring.formats.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """What `run_server` is to do.

    Attributes:
        model: a Hugging Face directory, a GGUF file, or a known name.
        port: 0 takes a free one.
        served_model_name: the name in the API; None: the model's own.
        dtype: "float32" or "bfloat16"; None: the checkpoint's own.
        num_threads: threads of one operation on a CPU; None: PyTorch's choice.
        max_body_bytes: largest request body.
        drain_seconds: how long running requests may go on after SIGTERM.
        pooling: of embeddings, unless a request says otherwise: "mean" or "last".
        max_choices: largest `n` of a request.
        template_seconds: how long the chat template may take for one conversation.
        chat_template: a file with a Jinja template to use instead of the model's own.
        tool_parser: the format of the model's calls: "auto" (by its chat template), "none", or one of TOOL_FORMATS.
        reasoning_parser: "think", "none", or "auto" (by its chat template).
        api_keys: any of these opens the API; without one it is open.
        admin_keys: any of these opens the routes of administration; without one they are closed.
        open_paths: paths that need no key: files of a page that asks for it.
        max_restarts: how often the engine process is started again after it has died.
        allowed_hosts: names that a Host header may have besides the loopback ones. The header is checked
            when the server listens on a loopback address only, or when names are given.

    Raises:
        ConfigError: a value is out of range.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str | None = None
    device: str = "cpu"
    dtype: str | None = None
    numerics: Literal["lockstep", "fast"] = "lockstep"
    engine: EngineConfig = field(default_factory=EngineConfig)
    num_threads: int | None = None
    max_body_bytes: int = 16 * 2**20
    drain_seconds: float = 30.0
    pooling: Pooling = "mean"
    max_choices: int = 128
    template_seconds: float = 5.0
    chat_template: str | None = None
    tool_parser: str = "auto"
    reasoning_parser: str = "auto"
    api_keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()
    open_paths: frozenset[str] = frozenset()
    max_restarts: int = 0
    allowed_hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}, but must be between 0 and 65535")
        if self.num_threads is not None and self.num_threads < 1:
            raise ConfigError(f"num_threads is {self.num_threads}, but must be at least 1")
        if self.max_body_bytes < 1:
            raise ConfigError(f"max_body_bytes is {self.max_body_bytes}, but must be at least 1")
        if not 0 <= self.drain_seconds < float("inf"):
            raise ConfigError(f"drain_seconds is {self.drain_seconds}, but must be a number of at least 0")
        if not 1 <= self.max_choices <= MAX_N:
            raise ConfigError(f"max_choices is {self.max_choices}, but must be between 1 and {MAX_N}")
        if not 0 < self.template_seconds < float("inf"):
            raise ConfigError(f"template_seconds is {self.template_seconds}, but must be a number above 0")
        if self.pooling not in get_args(Pooling):
            raise ConfigError(f"pooling is {self.pooling!r}, but must be mean or last")
        if self.max_restarts < 0:
            raise ConfigError(f"max_restarts is {self.max_restarts}, but must be at least 0")
        if not all((*self.api_keys, *self.admin_keys)):
            raise ConfigError("an empty key was given, which everybody knows; give another or none")


def run_server(
    settings: ServerSettings, reporter: Reporter, extend: Callable[[FastAPI, AsyncLLM], None] | None = None
) -> int:
    """Serves until a signal ends it; returns the exit status (0 after a drain).

    The first SIGTERM or Ctrl-C drains: new requests get 503, running ones finish (for `drain_seconds` at
    most). The second ends everything at once. `extend` adds routes to the application.

    Raises:
        ModelNotFoundError, CheckpointError, UnsupportedModelError, ConfigError: what loading the model raises.
        EngineDeadError: the engine process ended before it was ready.
    """
    listener = _bind(settings.host, settings.port)
    template = _read_template(settings.chat_template)
    with listener, EngineSupervisor(reporter, settings.max_restarts) as supervisor:
        reporter.step(f"Looking for the model {settings.model}")
        # The engine process imports PyTorch meanwhile.
        from mainspring.engine.server.model_source import resolve_model

        resolved = resolve_model(settings.model, settings.dtype, reporter)
        supervisor.load(
            Load(
                model=str(resolved.path),
                device=settings.device,
                dtype=settings.dtype,
                numerics=settings.numerics,
                config=settings.engine,
                num_threads=settings.num_threads,
            )
        )
        reporter.step("Starting the engine")
        return asyncio.run(_serve(settings, reporter, extend, listener, supervisor, resolved, template))


def _read_template(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The chat template {path!r} cannot be read: {error}") from error


def _bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: a port in use is reported before the model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(
            f"The address {host!r} cannot be used ({error}); give another with --host."
        ) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise ConfigError(
            f"Cannot listen on {host} port {port} ({reason}); give another port with --port (0 takes a free one)."
        ) from error
    return listener


async def _serve(
    settings: ServerSettings,
    reporter: Reporter,
    extend: Callable[[FastAPI, AsyncLLM], None] | None,
    listener: socket.socket,
    supervisor: EngineSupervisor,
    resolved: ResolvedModel,
    template: str | None,
) -> int:
    signals = _Signals(supervisor)
    # Imported here, and the tokenizer read, while the engine process loads the model.
    import uvicorn

    from mainspring.formats.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_directory(
        resolved.path, chat_template=template, template_seconds=settings.template_seconds
    )
    warm = asyncio.create_task(asyncio.to_thread(_start_template, tokenizer))
    ready = await signals.unless_stopped(supervisor.until_ready())
    if ready is None:
        supervisor.kill()
        return 0
    await warm
    name = settings.served_model_name or resolved.name
    gate, llm, app = _application(settings, extend, supervisor, ready, tokenizer, name)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=2
    )
    server = _server_without_signals(config)
    messages = asyncio.create_task(supervisor.run(llm))
    drain = asyncio.create_task(_drain(signals, gate, llm, server, settings.drain_seconds, reporter))
    # From here on connections wait in the listener's queue until uvicorn takes them.
    listener.listen(config.backlog)
    reporter.ready(_url(settings.host, listener), name, ready)
    try:
        await server.serve(sockets=[listener])
    finally:
        for task in (messages, drain):
            task.cancel()
        await asyncio.wait({messages, drain})
    return 0


def _application(
    settings: ServerSettings,
    extend: Callable[[FastAPI, AsyncLLM], None] | None,
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


def _start_template(tokenizer: Tokenizer) -> None:
    """Starts the chat template's process, so that the first request need not wait for it."""
    # A template may refuse this conversation, and a model may have none; requests will be told.
    with contextlib.suppress(ChatTemplateError):
        tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}])


async def _drain(
    signals: _Signals,
    gate: DrainGate,
    llm: AsyncLLM,
    server: uvicorn.Server,
    seconds: float,
    reporter: Reporter,
) -> None:
    """After the first signal: closes the gate, waits for running requests, and tells the server to end."""
    await signals.stop.wait()
    gate.drain()
    if gate.in_flight:
        reporter.note(
            f"Finishing {gate.in_flight} running requests (at most {seconds:g} s; signal again to end now)"
        )
    try:
        await asyncio.wait_for(gate.wait_idle(), seconds)
    except TimeoutError:
        reporter.note(f"Dropping {gate.in_flight} requests that are still running after {seconds:g} s")
        llm.fail_all(EngineDeadError("The server is shutting down and has dropped this request."))
    server.should_exit = True


class _Signals:
    """SIGTERM and Ctrl-C: the first sets `stop`, the second ends both processes at once."""

    def __init__(self, supervisor: EngineSupervisor) -> None:
        self.stop = asyncio.Event()
        self._supervisor = supervisor
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: signal.Signals) -> None:
        if self.stop.is_set():
            self._supervisor.kill()
            os._exit(128 + number)
        self.stop.set()

    async def unless_stopped(self, start: Coroutine[Any, Any, Ready]) -> Ready | None:
        """The result of the start, or None if a signal came first."""
        starting = asyncio.create_task(start)
        stopping = asyncio.create_task(self.stop.wait())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not starting.done():
            starting.cancel()
            return None
        return await starting


def _server_without_signals(config: uvicorn.Config) -> uvicorn.Server:
    """A uvicorn server that leaves the process's signals to us."""
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    return Server(config)


def _url(host: str, listener: socket.socket) -> str:
    """An address that a browser on this machine can open."""
    port = listener.getsockname()[1]
    name = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"
