"""Finding stop strings in text that arrives in pieces, without ever showing a part of one."""

from __future__ import annotations

from collections.abc import Sequence


class StopStringScanner:
    """Cuts a stream of text just before the first stop string.

    The first one is the one that is complete first, so the result does not depend on how the text was cut
    into pieces. The end of the text that could still become a stop string is held back until it is decided:
    what `push` has returned is never taken back.

    Attributes:
        matched: the stop string that was found, or None.
    """

    def __init__(self, stop_strings: Sequence[str], include_in_output: bool = False) -> None:
        self._stop_strings = tuple(stop_strings)
        self._include_in_output = include_in_output
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str, armed: bool = True) -> str:
        """Take the next piece of text and return what can be shown of all text so far.

        `armed=False` shows text without ending at a stop string that is completed by this piece.
        After a match nothing more is taken.
        """
        if not self._stop_strings or self.matched is not None:
            return text if self.matched is None else ""
        window = self._held + text
        if armed:
            found = self._find(window)
            if found is not None:
                start, self.matched = found
                self._held = ""
                return window[: start + len(self.matched)] if self._include_in_output else window[:start]
        held_length = self._undecided_length(window)
        shown = len(window) - held_length
        self._held = window[shown:]
        return window[:shown]

    def finish(self) -> str:
        """The text ends here: return what was held back."""
        held, self._held = self._held, ""
        return held

    def _find(self, window: str) -> tuple[int, str] | None:
        """Start and name of the stop string that ends first (of those, the longest), or None.

        Only one that ends in the new text counts; the held text may hold a complete one from when the
        scanner was not armed.
        """
        best: tuple[int, int, str] | None = None
        for stop_string in self._stop_strings:
            start = window.find(stop_string, max(0, len(self._held) - len(stop_string) + 1))
            if start >= 0:
                candidate = (start + len(stop_string), start, stop_string)
                best = candidate if best is None else min(best, candidate)
        return None if best is None else best[1:]

    def _undecided_length(self, window: str) -> int:
        """Length of the longest end of the window that begins a stop string without completing it."""
        longest = 0
        for stop_string in self._stop_strings:
            for length in range(min(len(stop_string) - 1, len(window)), longest, -1):
                if window.endswith(stop_string[:length]):
                    longest = length
                    break
        return longest
