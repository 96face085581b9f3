"""Running the server: engine process and HTTP frontend started side by side, drained and ended together."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
from collections.abc import Coroutine, Iterator
from typing import TYPE_CHECKING, Any

from mainspring.engine.server.assembly import (
    Extend,
    assemble,
    load_message,
    read_template,
    read_tokenizer,
    start_template,
)
from mainspring.engine.server.protocol import Ready
from mainspring.engine.server.reporter import Reporter
from mainspring.engine.server.settings import ServerSettings
from mainspring.engine.server.supervisor import EngineSupervisor
from mainspring.errors import ConfigError, EngineDeadError

if TYPE_CHECKING:
    import uvicorn

    from mainspring.engine.server.async_llm import AsyncLLM
    from mainspring.engine.server.middleware import DrainGate
    from mainspring.formats.named_models import ResolvedModel


def run_server(settings: ServerSettings, reporter: Reporter, extend: Extend | None = None) -> int:
    """Serves until a signal ends it; returns the exit status (0 after a drain).

    The first SIGTERM or Ctrl-C drains: new requests get 503, running ones finish (for `drain_seconds` at
    most). The second ends everything at once. `extend` adds routes to the application.

    Raises:
        ModelNotFoundError, CheckpointError, UnsupportedModelError, ConfigError: what loading the model raises.
        EngineDeadError: the engine process ended before it was ready.
    """
    listener = _bind(settings.host, settings.port)
    template = read_template(settings.chat_template)
    with listener, EngineSupervisor(reporter, settings.max_restarts) as supervisor:
        reporter.step(f"Looking for the model {settings.model}")
        # The engine process imports PyTorch meanwhile.
        from mainspring.engine.server.model_source import resolve_model

        resolved = resolve_model(settings.model, settings.dtype, reporter)
        supervisor.load(load_message(settings, resolved.path))
        reporter.step("Starting the engine")
        return asyncio.run(_serve(settings, reporter, extend, listener, supervisor, resolved, template))


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
    extend: Extend | None,
    listener: socket.socket,
    supervisor: EngineSupervisor,
    resolved: ResolvedModel,
    template: str | None,
) -> int:
    signals = _Signals(supervisor)
    # Imported here, and the tokenizer read, while the engine process loads the model.
    import uvicorn

    tokenizer = read_tokenizer(settings, resolved.path, template)
    warm = asyncio.create_task(asyncio.to_thread(start_template, tokenizer))
    ready = await signals.unless_stopped(supervisor.until_ready())
    if ready is None:
        supervisor.kill()
        return 0
    await warm
    name = settings.served_model_name or resolved.name
    gate, llm, app = assemble(settings, extend, supervisor, ready, tokenizer, name)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=2
    )
    server = _server_without_signals(config)
    messages = asyncio.create_task(supervisor.run(llm))
    drain = asyncio.create_task(_drain(signals, gate, llm, server, settings.drain_seconds, reporter))
    # What is there now stays: the collector need not look at it again, which would hold the streams up.
    gc.collect()
    gc.freeze()
    # From here on connections wait in the listener's queue until uvicorn takes them.
    listener.listen(config.backlog)
    reporter.ready(_url(settings.host, listener), name, ready, tokenizer.chat_template is not None)
    try:
        await server.serve(sockets=[listener])
    finally:
        for task in (messages, drain):
            task.cancel()
        await asyncio.wait({messages, drain})
    return 0


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
