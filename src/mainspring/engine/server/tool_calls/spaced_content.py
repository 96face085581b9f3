"""Content between calls: white space waits for more text, and goes if a call comes instead."""

from __future__ import annotations

from mainspring.engine.server.tool_calls.events import Content, EventList


class SpacedContent:
    """Writes content into `found`."""

    def __init__(self, found: EventList) -> None:
        self._found = found
        self._spaces: list[str] = []

    def write(self, text: str) -> None:
        """More text."""
        for character in text:
            if character.isspace():
                self._spaces.append(character)
            else:
                self._found.add(Content("".join(self._spaces) + character))
                self._spaces = []

    def drop_spaces(self) -> None:
        """A call has come."""
        self._spaces = []

    def keep_spaces(self) -> None:
        """The text has ended, and held no call: it is content to the letter."""
        self._found.add(Content("".join(self._spaces)))
        self._spaces = []
