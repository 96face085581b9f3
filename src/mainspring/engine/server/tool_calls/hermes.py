"""Calls in the format of Hermes and Qwen: <tool_call>{"name": ..., "arguments": {...}}</tool_call>."""

from __future__ import annotations

from enum import Enum, auto

from mainspring.engine.server.tool_calls.call_object import CallObject
from mainspring.engine.server.tool_calls.events import CallArguments, CallBegin, Event, EventList
from mainspring.engine.server.tool_calls.spaced_content import SpacedContent
from mainspring.engine.server.tool_calls.tag_finder import TagFinder

OPEN = "<tool_call>"
CLOSE = "</tool_call>"


class _In(Enum):
    TEXT = auto()
    CALL = auto()
    AFTER_CALL = auto()
    BROKEN = auto()


class HermesParser:
    """Any number of calls, between any text.

    A tag may also hold a list of calls, as SmolLM2 writes them. What stands in a tag and is no call is given
    as content, tag included. A call whose JSON breaks after its name keeps what the model wrote as its
    arguments, up to the closing tag. White space before a call, and after the last one, is dropped.
    """

    def __init__(self) -> None:
        self._in = _In.TEXT
        self._tag = TagFinder(OPEN)
        self._close = TagFinder(CLOSE)
        self._call = CallObject(None)
        self._raw: list[str] = []  # the text of the call being read, until its name is known
        self._may_be_list = False
        self._count = 0
        self._found = EventList()
        self._content = SpacedContent(self._found)

    def push(self, text: str) -> list[Event]:
        """The events of these further characters."""
        for character in text:
            self._step(character)
        return self._found.take()

    def finish(self) -> list[Event]:
        """What is left at the end."""
        if self._in is _In.CALL and self._call.name is None:
            self._give_up()
        if self._in is _In.TEXT:
            self._content.write(self._tag.flush())
            if self._count == 0:
                self._content.keep_spaces()
        elif self._in is _In.BROKEN:
            self._found.add(CallArguments(self._count - 1, self._close.flush()))
        return self._found.take()

    def _step(self, character: str) -> None:
        match self._in:
            case _In.TEXT:
                self._content.write(self._tag.push(character))
                if self._tag.found:
                    self._begin_call(OPEN)
            case _In.CALL:
                self._read_call(character)
            case _In.BROKEN:
                self._found.add(CallArguments(self._count - 1, self._close.push(character)))
                if self._close.found:
                    self._in = _In.TEXT
            case _In.AFTER_CALL:
                self._after_call(character)

    def _begin_call(self, raw: str) -> None:
        self._in, self._call, self._raw = _In.CALL, CallObject(None), [raw]
        self._may_be_list = raw == OPEN

    def _read_call(self, character: str) -> None:
        known = self._call.name is not None
        if not known:
            self._raw.append(character)
            if self._may_be_list and character == "[":
                self._may_be_list = False
                return
            self._may_be_list &= character.isspace()
        arguments = self._call.push(character)
        if not known and self._call.name is not None:
            self._raw = []
            self._content.drop_spaces()
            self._found.add(CallBegin(self._count, self._call.name))
            self._count += 1
        if arguments:
            self._found.add(CallArguments(self._count - 1, arguments))
        if self._call.complete:
            self._in, self._close = _In.AFTER_CALL, TagFinder(CLOSE)
        elif self._call.failed and self._call.name is None:
            # The character that broke it may begin something else, such as the next tag.
            self._raw.pop()
            self._give_up()
            self._step(character)
        elif self._call.failed:
            self._in, self._close = _In.BROKEN, TagFinder(CLOSE)
            self._step(character)

    def _give_up(self) -> None:
        """What was read is no call: it is text."""
        self._in, self._tag = _In.TEXT, TagFinder(OPEN)
        raw, self._raw = "".join(self._raw), []
        self._content.write(raw)

    def _after_call(self, character: str) -> None:
        """White space, the closing tag, or a further call of a list."""
        if not self._close.held:
            if character == ",":
                self._begin_call(character)
                return
            if character.isspace() or character == "]":
                return
        released = self._close.push(character)
        if self._close.found:
            self._in = _In.TEXT
        elif released:
            # The model forgot the closing tag.
            rest = released + self._close.flush()
            self._in, self._tag = _In.TEXT, TagFinder(OPEN)
            for item in rest:
                self._step(item)
