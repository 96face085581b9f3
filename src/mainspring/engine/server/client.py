"""The frontend's end of the engine process: starts it, talks to it, notices its death, ends it."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

import mainspring.errors
from mainspring.engine.server.protocol import (
    TO_ENGINE,
    TO_FRONTEND,
    Failed,
    FromEngine,
    Shutdown,
    ToEngine,
    decode_from_engine,
    encode,
)
from mainspring.errors import EngineDeadError, InvalidRequestError, MainspringError

STOP_SECONDS = 3.0


class EngineProcess:
    """A running engine process and the two sockets to it, in a directory that only this user can enter.

    The process starts at once and imports PyTorch while the caller prepares the Load message. Messages can
    be sent from the start; they are received on the event loop that first calls `receive`.
    """

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="mainspring-"))  # mode 0700
        self._context = zmq.Context()
        self._outbox = self._context.socket(zmq.PUSH)
        self._inbox = self._context.socket(zmq.PULL)
        for socket in (self._outbox, self._inbox):
            socket.set_hwm(0)
        self._inbox.bind(f"ipc://{self._directory / TO_FRONTEND}")
        self._outbox.connect(f"ipc://{self._directory / TO_ENGINE}")
        # In a session of its own, so that Ctrl-C reaches this process alone, which then ends the other. The
        # child reads its standard input only to notice that this process has gone.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mainspring.engine.server.engine_process", str(self._directory)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        self._async_inbox: zmq.asyncio.Socket | None = None
        self._ended: asyncio.Future[int] | None = None

    @property
    def pid(self) -> int:
        """The process id of the engine."""
        return self._process.pid

    def send(self, message: ToEngine) -> None:
        """Queues a message; never blocks. A message to a dead engine goes nowhere: `receive` reports the death."""
        self._outbox.send(encode(message), zmq.NOBLOCK)

    async def receive(self) -> FromEngine:
        """The next message but Failed.

        Raises:
            MainspringError: the engine reported an error that a user can mend (a bad checkpoint, say).
            EngineDeadError: it failed otherwise, or its process has ended.
        """
        inbox, ended = self._attach()
        incoming = asyncio.ensure_future(inbox.recv())
        waiting: set[asyncio.Future[Any]] = {incoming, ended}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not incoming.done():
            # The last words of a dying process may still be on their way through the socket.
            await asyncio.wait({incoming}, timeout=0.2)
        if not incoming.done():
            incoming.cancel()
            raise EngineDeadError(
                f"The engine process has ended ({_ending(ended.result())}); restart the server."
            )
        message = decode_from_engine(incoming.result())
        if isinstance(message, Failed):
            raise error_of_kind(message.kind, message.message, None)
        return message

    def stop(self) -> None:
        """Ends the process (by force after three seconds) and removes the directory. May be called twice."""
        if self._process.poll() is None:
            self.send(Shutdown())
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
        self.kill()
        if self._async_inbox is not None:
            self._async_inbox.close(linger=0)
        self._inbox.close(linger=0)
        self._outbox.close(linger=0)
        self._context.term()

    def kill(self) -> None:
        """Ends the process at once and removes the directory."""
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _attach(self) -> tuple[zmq.asyncio.Socket, asyncio.Future[int]]:
        """The inbox and the end of the process as things that the running event loop can await."""
        if self._async_inbox is not None and self._ended is not None:
            return self._async_inbox, self._ended
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[int] = loop.create_future()

        def wait_for_end() -> None:
            status = self._process.wait()
            # The loop is closed if the process was ended in `stop`, after the loop.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_set_once, ended, status)

        threading.Thread(target=wait_for_end, name="engine-watch", daemon=True).start()
        self._async_inbox = zmq.asyncio.Socket.shadow(self._inbox)
        self._ended = ended
        return self._async_inbox, ended


def error_of_kind(kind: str, message: str, param: str | None) -> MainspringError:
    """The error of `mainspring.errors` with that class name; of an unknown kind: EngineDeadError."""
    known = getattr(mainspring.errors, kind, None)
    if not (isinstance(known, type) and issubclass(known, MainspringError)):
        return EngineDeadError(f"The engine failed ({kind}: {message}); its log has the traceback.")
    return known(message, param) if issubclass(known, InvalidRequestError) else known(message)


def _set_once(future: asyncio.Future[int], value: int) -> None:
    if not future.done():
        future.set_result(value)


def _ending(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"exit status {status}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-status).name
    return f"signal {-status}"
