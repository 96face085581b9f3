"""A user's code in a process of its own, called one message at a time: one that raises, hangs or dies harms no run."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from mainspring.errors import ConfigError, MainspringError

_START_SECONDS = 120.0  # the process's imports; a call is timed without them

Handler = Callable[..., Any]
"""What answers messages in the process; it may keep a state of its own."""


class CallFailedError(MainspringError):
    """A call raised, did not answer in time, or its process died; the text says which."""


class WorkerStartError(ConfigError):
    """What is to run in the process cannot be imported there, or has no name to import it by."""


class Worker:
    """`call` asks the handler, within `timeout` seconds. The process begins with the first call, and anew after one
    that did not answer.

    make: is called in the process and gives the handler; it must be importable there by name, as must what it is
    partial of. Not thread-safe. Raises ConfigError for a timeout that is not above 0.
    """

    def __init__(self, make: Callable[[], Handler], *, name: str, timeout: float) -> None:
        """name: for messages, as "the reward function f"."""
        if not timeout > 0:
            raise ConfigError(f"{name}: the timeout must be above 0 seconds, got {timeout}")
        self._make, self._name, self._timeout = make, name, timeout
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None
        self.starts = 0
        """Processes so far; a state that was kept in one is gone with it."""

    def start(self) -> None:
        """Starts the process, if none is running. Raises WorkerStartError."""
        if self._pipe is None:
            self._pipe = self._start()
            self.starts += 1

    def call(self, *message: Any) -> Any:
        """What the handler answers. Raises CallFailedError, and what `start` raises."""
        self.start()
        pipe = self._pipe
        assert pipe is not None  # of start
        try:
            pipe.send(message)
            if not pipe.poll(self._timeout):
                self.close()
                raise CallFailedError(f"it did not answer within {self._timeout} s")
            value, problem = pipe.recv()
        except (EOFError, OSError) as error:
            self.close()
            raise CallFailedError("its process died") from error
        if problem is not None:
            raise CallFailedError(problem)
        return value

    def close(self) -> None:
        """Ends the process at once."""
        if self._process is not None and self._pipe is not None:
            self._pipe.close()
            self._process.kill()
            self._process.join()
        self._process = self._pipe = None

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")  # a fork would copy the trainer's threads' locks
        pipe, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(self._make, theirs), daemon=True)
        try:
            process.start()
        except (pickle.PicklingError, AttributeError) as error:
            pipe.close()
            theirs.close()
            raise WorkerStartError(
                f"{self._name} cannot be handed to a worker ({error}); define it at the top level of a module"
            ) from error
        theirs.close()  # so that the child's end closes with the child
        self._process, self._pipe = process, pipe
        try:
            ready = pipe.poll(_START_SECONDS) and pipe.recv()
        except (EOFError, OSError):
            ready = False
        if not ready:
            self.close()
            raise WorkerStartError(
                f"the worker of {self._name} did not start; its module must be importable in a fresh process"
            )
        return pipe


def _serve(make: Callable[[], Handler], pipe: Connection) -> None:
    """The process's loop; it ends when the other end of the pipe is closed."""
    handler = make()
    pipe.send(True)
    while True:
        try:
            message = pipe.recv()
        except EOFError:
            return
        value, problem = None, None
        try:
            value = handler(*message)
        except Exception as error:  # whatever a user's code raises is that call's failure
            problem = f"{type(error).__name__}: {error}"
        pipe.send((value, problem))
