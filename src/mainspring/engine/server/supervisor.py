"""The engine process of a server over its life: started, awaited, and started again if it dies."""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import TYPE_CHECKING

from mainspring.engine.server.client import EngineProcess
from mainspring.engine.server.protocol import Load, Progress, Ready
from mainspring.engine.server.reporter import Reporter
from mainspring.errors import EngineDeadError, MainspringError

if TYPE_CHECKING:
    from mainspring.engine.server.async_llm import AsyncLLM

# An engine that has run for that long is not caught in a loop of deaths.
_STABLE_SECONDS = 60.0
_LONGEST_PAUSE = 30.0


class EngineSupervisor:
    """Owns the engine process. The first one starts with this object, and imports while the model is looked for.

    Leaving the context ends the process, at once if because of an error.
    """

    def __init__(self, reporter: Reporter, max_restarts: int) -> None:
        self._reporter = reporter
        self._max_restarts = max_restarts
        self._load: Load | None = None
        self._closed = False
        self.engine = EngineProcess()

    def __enter__(self) -> EngineSupervisor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            # It may be importing or loading, where it reads no messages.
            self.kill()
        self._closed = True
        self.engine.stop()

    def load(self, message: Load) -> None:
        """Tells the engine what to load. A later one is told the same."""
        self._load = message
        self.engine.send(message)

    async def until_ready(self) -> Ready:
        """Shows the engine's progress until it is ready. Raises: what it answers instead."""
        while True:
            match await self.engine.receive():
                case Progress(message):
                    self._reporter.step(message)
                case Ready() as ready:
                    return ready
                case other:
                    raise EngineDeadError(f"The engine sent {type(other).__name__} before it was ready.")

    def kill(self) -> None:
        """Ends the process at once; no other follows."""
        self._closed = True
        self.engine.kill()

    async def run(self, llm: AsyncLLM) -> None:
        """Hands messages to `llm` until cancelled, through up to `max_restarts` deaths of the engine.

        Returns when the engine has died for good; `llm.dead` says why.
        """
        restarts, pause = 0, 1.0
        while True:
            began = time.monotonic()
            await llm.run()
            if time.monotonic() - began > _STABLE_SECONDS:
                pause = 1.0
            ready = False
            while not ready:
                if restarts == self._max_restarts or self._closed:
                    return
                restarts += 1
                ready = await self._restart(llm, restarts, pause)
                pause = min(2 * pause, _LONGEST_PAUSE)

    async def _restart(self, llm: AsyncLLM, number: int, pause: float) -> bool:
        """Starts another engine; whether it got ready."""
        reason = "unknown" if llm.dead is None else str(llm.dead).removesuffix("; restart the server.")
        llm.dead = EngineDeadError(f"{reason}; it is being started again, so try again in a moment.")
        self._reporter.note(f"{reason}; starting it again ({number} of {self._max_restarts})")
        self.engine.stop()
        await asyncio.sleep(pause)
        if self._closed:
            return False
        self.engine = EngineProcess()
        if self._load is not None:
            self.load(self._load)
        try:
            ready = await self.until_ready()
        except MainspringError as error:
            llm.dead = EngineDeadError(f"The engine could not be started again: {error}")
            return False
        llm.restarted(self.engine, ready)
        self._reporter.note("The engine is ready again")
        return True
