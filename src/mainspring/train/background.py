"""Work that goes on beside the training loop, one piece at a time: the writing of a checkpoint."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

_POLL_S = 0.5


class BackgroundWriter:
    """Runs `write`, which needs nothing of the training loop any more, in a thread of its own.

    A failure is kept until `wait` raises it. The thread is a daemon: a process that dies takes it along,
    and what it has not finished is not visible.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._result: Path | None = None
        self._failure: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether the write has ended in a failure that nobody has been told of."""
        return self._failure is not None

    def start(self, write: Callable[[], Path]) -> None:
        """Begins; the former write must have been collected."""
        if self._thread is not None:
            raise RuntimeError("a write is still uncollected; wait for it first")  # the loop's own mistake
        self._thread = threading.Thread(target=self._run, args=(write,), name="checkpoint", daemon=True)
        self._thread.start()

    def collect(self) -> Path | None:
        """What the write gave if it has ended well, else None: a failure is left to `wait`."""
        if self._thread is None or self._thread.is_alive() or self.failed:
            return None
        return self.wait()

    def wait(self, meanwhile: Callable[[], None] | None = None) -> Path | None:
        """Waits for the write and gives its result, None without one. Raises what the write raised.

        meanwhile: called every now and then, to tell a watchdog that this is no hang.
        """
        if self._thread is None:
            return None
        while self._thread.is_alive():
            self._thread.join(_POLL_S)
            if meanwhile is not None:
                meanwhile()
        self._thread = None
        result, failure = self._result, self._failure
        self._result = self._failure = None
        if failure is not None:
            raise failure
        return result

    def _run(self, write: Callable[[], Path]) -> None:
        try:
            self._result = write()
        except BaseException as error:  # it belongs to the training loop, whatever it is
            self._failure = error
