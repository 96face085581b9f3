"""The parsers that look for no call: all text is content, or all of it is one call's arguments."""

from __future__ import annotations

from mainspring.engine.server.tool_calls.events import CallArguments, CallBegin, Content, Event


class PlainText:
    """Everything is content."""

    def push(self, text: str) -> list[Event]:
        """This text, as it is."""
        return [Content(text)] if text else []

    def finish(self) -> list[Event]:
        """Nothing is ever held back."""
        return []


class NamedCall:
    """The text is the arguments of a call of `name`: a grammar holds the model to its schema."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._begun = False

    def push(self, text: str) -> list[Event]:
        """More arguments, after the call's beginning."""
        if not text:
            return []
        arguments = CallArguments(0, text)
        if self._begun:
            return [arguments]
        self._begun = True
        return [CallBegin(0, self._name), arguments]

    def finish(self) -> list[Event]:
        """Nothing is ever held back."""
        return []
