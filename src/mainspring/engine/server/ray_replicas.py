"""Replicas of the server under Ray Serve: on several GPUs, or on the machines of a Ray cluster.

Each replica is a Ray actor with a whole server in it: frontend, and the engine as a process of its own. Ray's proxy
hands each request to the replica with the shorter queue. What crosses Ray's wire is HTTP and these settings (Ray
pickles them itself). Without an address of a cluster, Ray listens on this machine only, but for each replica's port for
calls between deployments, which Ray Serve binds to every address: like all of Ray's, it answers to whoever has the
token, which is drawn anew at each start.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import threading
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
from mainspring.engine.server.settings import ServerSettings
from mainspring.engine.server.supervisor import EngineSupervisor
from mainspring.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from mainspring.engine.server.reporter import Reporter

APPLICATION = "mainspring"
log = logging.getLogger(__name__)


class LogReporter:
    """A replica has no terminal: what it does goes to its log."""

    def step(self, message: str) -> None:
        """A new step of the start has begun."""
        log.info(message)

    def progress(self, done: int, total: int) -> None:
        """Not logged."""

    def ready(self, url: str, model_name: str, ready: Ready, chats: bool) -> None:
        """Ray tells when a replica is ready."""

    def note(self, message: str) -> None:
        """Something happened after the start."""
        log.warning(message)


class Replica:
    """One server as Ray Serve runs it: made, asked for its application, watched, and ended by Ray."""

    # Ray awaits a constructor that is a coroutine function.
    async def __init__(  # type: ignore[misc]  # Python and its types know none
        self, settings: ServerSettings, extend: Extend | None
    ) -> None:
        from mainspring.engine.server.model_source import resolve_model

        reporter = LogReporter()
        self._supervisor = EngineSupervisor(reporter, settings.max_restarts)
        try:
            resolved = resolve_model(settings.model, settings.dtype, reporter)
            self._supervisor.load(load_message(settings, resolved.path))
            tokenizer = read_tokenizer(settings, resolved.path, read_template(settings.chat_template))
            await asyncio.to_thread(start_template, tokenizer)
            ready = await self._supervisor.until_ready()
        except BaseException:
            self._supervisor.kill()
            raise
        name = settings.served_model_name or resolved.name
        _, self._llm, self._app = assemble(settings, extend, self._supervisor, ready, tokenizer, name)
        self._messages = asyncio.create_task(self._supervisor.run(self._llm))

    def __serve_build_asgi_app__(self) -> Any:
        """The application that Ray hands requests to."""
        return self._app

    def check_health(self) -> None:
        """Asked by Ray now and then. Raises EngineDeadError where no restart is left: Ray then replaces the replica."""
        if self._messages.done() and self._llm.dead is not None:
            raise self._llm.dead

    async def __del__(self) -> None:
        """Called by Ray when the replica has finished its requests and is to end."""
        self._messages.cancel()
        await asyncio.wait({self._messages})
        self._supervisor.kill()
        self._supervisor.engine.stop()


def run_replicas(
    settings: ServerSettings,
    reporter: Reporter,
    replicas: int,
    address: str | None,
    extend: Extend | None = None,
) -> int:
    """Serves with that many replicas until SIGTERM or Ctrl-C; returns the exit status (0).

    Running requests may finish for `drain_seconds`. `address`: of a running Ray cluster, or "auto"; None starts Ray on
    this machine, for this server alone.

    Raises:
        ConfigError: a setting does not go with replicas, Ray is not installed, or no replica got ready.
    """
    if replicas < 1:
        raise ConfigError(f"replicas is {replicas}, but must be at least 1")
    if settings.admin_keys:
        raise ConfigError(
            "an administration key was given, but a request would reach one replica only; leave it out"
        )
    if settings.port == 0:
        raise ConfigError("Ray's proxy cannot take a free port by itself; give one with --port")
    if address is None:
        _keep_to_this_machine()
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise ConfigError(f"Ray is not installed ({error}): pip install 'mainspring[ray]'") from error
    reporter.step("Starting Ray")
    if address is None:
        ray.init(
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            log_to_driver=False,
            configure_logging=False,
        )
    else:
        ray.init(address=address, log_to_driver=False)
    try:
        serve.start(http_options={"host": settings.host, "port": settings.port})
        reporter.step(f"Starting {replicas} replicas")
        serve.run(
            _application(serve, settings, replicas, extend),
            name=APPLICATION,
            route_prefix="/",
        )
        reporter.note(
            f"{replicas} replicas serve http://{settings.host}:{settings.port}/v1; Ctrl-C stops them."
        )
        _wait_for_signal()
        reporter.note("Finishing running requests")
        return 0
    except RuntimeError as error:
        raise ConfigError(f"The replicas did not start: {error}") from error
    finally:
        serve.shutdown()
        ray.shutdown()


def _keep_to_this_machine() -> None:
    """Before Ray is imported, which reads these variables then. Raises ConfigError where its calls would be open."""
    # Ray would listen on every address of the machine. This variable makes 127.0.0.1 the node's address (it is named
    # after the systems where that is the default), and then Ray listens there only.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    mode = os.environ.setdefault("RAY_AUTH_MODE", "token")
    if mode.lower() != "token":
        raise ConfigError(
            f"RAY_AUTH_MODE is {mode!r}, but each replica has a port that listens on every address: whoever reaches it "
            "could run code here; unset the variable"
        )
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _application(serve: Any, settings: ServerSettings, replicas: int, extend: Extend | None) -> Any:
    """The application as Ray Serve knows it."""
    ingress: Callable[[type[Replica]], Any] = serve.ingress()
    deployment = serve.deployment(
        name="replica",
        num_replicas=replicas,
        # The engine queues by itself, and its batches want all the requests there are.
        max_ongoing_requests=10_000,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        ray_actor_options={
            "num_cpus": (settings.num_threads or 1) * settings.num_ranks,
            "num_gpus": settings.num_ranks if settings.device.startswith("cuda") else 0,
        },
    )
    return deployment(ingress(Replica)).bind(settings, extend)


def _wait_for_signal() -> None:
    """Returns on SIGTERM or Ctrl-C."""
    stopped = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: stopped.set()) for number in (signal.SIGTERM, signal.SIGINT)
    }
    # Waiting with a timeout lets the handlers run.
    while not stopped.wait(0.2):
        pass
    for number, handler in before.items():
        signal.signal(number, handler)
