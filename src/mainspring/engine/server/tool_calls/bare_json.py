"""Calls without tags: Llama 3's `{"name": ..., "parameters": {...}}; {...}`, and a list of such objects."""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum, auto

from mainspring.engine.server.tool_calls.call_object import CallObject
from mainspring.engine.server.tool_calls.events import CallArguments, CallBegin, Content, Event, EventList

PYTHON_TAG = "<|python_tag|>"
_BETWEEN = " \t\r\n;,[]"


class _In(Enum):
    START = auto()
    CALL = auto()
    BETWEEN = auto()
    BROKEN = auto()
    TEXT = auto()


class BareJsonParser:
    """The text is calls from its beginning on, or it is content.

    Objects may follow one another or stand in a list; Llama's <|python_tag|> may stand first. An object that
    names none of `names` is content: a model may answer in JSON.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)
        self._in = _In.START
        self._raw: list[str] = []  # what was read and may still be content
        self._opening = ""  # what of it is no white space, before the first call
        self._call = CallObject(self._names)
        self._count = 0
        self._found = EventList()

    def push(self, text: str) -> list[Event]:
        """The events of these further characters."""
        for index, character in enumerate(text):
            if self._in is _In.TEXT:
                self._found.add(Content(text[index:]))
                break
            self._step(character)
        return self._found.take()

    def finish(self) -> list[Event]:
        """What is left at the end."""
        if self._in is _In.START or (self._in is _In.CALL and self._call.name is None):
            self._found.add(Content("".join(self._raw)))
        return self._found.take()

    def _step(self, character: str) -> None:
        match self._in:
            case _In.START:
                self._raw.append(character)
                if character == "{" and self._opening.removeprefix(PYTHON_TAG) in ("", "["):
                    self._in = _In.CALL
                    self._call.push(character)
                elif not character.isspace():
                    self._opening += character
                    if not f"{PYTHON_TAG}[".startswith(self._opening) and self._opening != "[":
                        self._give_up()
            case _In.CALL:
                self._read_call(character)
            case _In.BETWEEN if character == "{":
                self._in, self._call, self._raw = _In.CALL, CallObject(self._names), [character]
                self._call.push(character)
            case _In.BETWEEN if character in _BETWEEN:
                return
            case _In.BETWEEN:
                self._raw = [character]
                self._give_up()
            case _:
                self._found.add(CallArguments(self._count - 1, character))

    def _read_call(self, character: str) -> None:
        known = self._call.name is not None
        if not known:
            self._raw.append(character)
        arguments = self._call.push(character)
        if not known and self._call.name is not None:
            self._found.add(CallBegin(self._count, self._call.name))
            self._count += 1
            self._raw = []
        if arguments:
            self._found.add(CallArguments(self._count - 1, arguments))
        if self._call.complete:
            self._in = _In.BETWEEN
        elif self._call.failed and self._call.name is None:
            self._give_up()
        elif self._call.failed:
            self._in = _In.BROKEN
            self._step(character)

    def _give_up(self) -> None:
        """The rest is content."""
        self._found.add(Content("".join(self._raw)))
        self._raw = []
        self._in = _In.TEXT
