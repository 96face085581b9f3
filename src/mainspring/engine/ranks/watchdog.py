"""A limit on how long rank 0 waits for the others: a collective on a device has none of its own here."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

_LOOK_SECONDS = 0.5


class Watchdog:
    """Calls `late(seconds)` once, from a thread of its own, when what was begun has not ended in that time.

    One thread begins and ends; limits may be nested, and then the inner one counts while it lasts.
    """

    def __init__(self, late: Callable[[float], None]) -> None:
        self._late = late
        self._limit: tuple[float, float] | None = None  # (when it ends by the monotonic clock, its seconds)
        self._closed = threading.Event()
        threading.Thread(target=self._look, name="rank-watchdog", daemon=True).start()

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """What is done inside is to end in so many seconds."""
        outer, self._limit = self._limit, (time.monotonic() + seconds, seconds)
        try:
            yield
        finally:
            self._limit = outer

    def close(self) -> None:
        """Looks no more."""
        self._closed.set()

    def _look(self) -> None:
        while not self._closed.wait(_LOOK_SECONDS):
            limit = self._limit
            if limit is not None and time.monotonic() > limit[0]:
                self._late(limit[1])
                return
