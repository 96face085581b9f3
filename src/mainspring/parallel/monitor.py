"""What a rank is doing, and a watchdog that says so and ends the process when it does nothing for too long.

A collective that one rank does not enter hangs all others, and a backend's own timeout says little, late. Every
collective of this room passes through a `Monitor`, which knows the step and the collective; its thread compares
the time since the last event with the limit.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections import Counter
from typing import TextIO

HUNG = 86
"""Exit status of a process that the watchdog has ended."""


class Monitor:
    """Counts traffic and keeps the last event. `watch` starts the thread that ends a hung process."""

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank
        self.step = 0
        self.traffic: Counter[tuple[str, str]] = Counter()
        """Bytes that this rank has put into each (collective, group)."""
        self._event = "nothing yet"
        self._open = False
        self._since = time.monotonic()
        self._stop = threading.Event()

    def begin_step(self, step: int) -> None:
        """A step begins: the limit counts from here."""
        self.step = step
        self._mark(f"computing step {step}", False)

    def enter(self, collective: str, group: str, ranks: tuple[int, ...], nbytes: int) -> None:
        """This rank enters a collective."""
        self.traffic[collective, group] += nbytes
        self._mark(f"{collective} over {group} (ranks {', '.join(map(str, ranks))}, {nbytes} bytes)", True)

    def progress(self) -> None:
        """Something that is no collective is done: a pass through a stage, a piece of a file."""
        self._since = time.monotonic()

    def leave(self) -> None:
        """The collective that was waited for is done."""
        self._since, self._open = time.monotonic(), False

    def describe(self) -> str:
        """The state in words: rank, step, collective."""
        verb = "in" if self._open else "after"
        return f"rank {self.rank}, step {self.step}, {verb} {self._event}"

    def watch(self, limit: float, stream: TextIO | None = None) -> None:
        """Ends the process with status HUNG once no event has come for `limit` seconds, stack traces first."""
        stream = stream or sys.stderr
        thread = threading.Thread(target=self._watch, args=(limit, stream), name="watchdog", daemon=True)
        thread.start()

    def stop(self) -> None:
        """Ends the watch; nothing that comes later is timed."""
        self._stop.set()

    def _mark(self, event: str, is_open: bool) -> None:
        self._event, self._open, self._since = event, is_open, time.monotonic()

    def _watch(self, limit: float, stream: TextIO) -> None:
        while not self._stop.wait(min(limit / 4, 1.0)):
            silent = time.monotonic() - self._since
            if silent < limit:
                continue
            stream.write(
                f"watchdog: {self.describe()}: nothing has happened for {silent:.0f} s (the limit is {limit:g} s). "
                "Another rank did not come to this collective, or a device hangs. Stack traces follow; "
                "the run stops.\n"
            )
            stream.flush()
            faulthandler.dump_traceback(file=stream, all_threads=True)
            stream.flush()
            os._exit(HUNG)
