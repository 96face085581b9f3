"""Calls whose parts are tags: Qwen3-Coder's <function=...><parameter=...>, and GLM-4.5's <arg_key> and <arg_value>."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from mainspring.engine.server.tool_calls.argument_values import ArgumentWriter
from mainspring.engine.server.tool_calls.events import CallArguments, CallBegin, Event, EventList
from mainspring.engine.server.tool_calls.spaced_content import SpacedContent
from mainspring.engine.server.tool_calls.tag_finder import TagFinder


@dataclass(frozen=True, slots=True)
class Tags:
    """How a model writes a call.

    Attributes:
        outer_open, outer_close: around a call.
        name_open, name_close: around the function's name; both empty: it ends at white space or at the next tag.
        key_open, key_close: around a parameter's name.
        value_open, value_close: around its value; value_open empty: it follows upon key_close.
        call_close: after the last parameter; outer_close may follow.
        on_lines: a value stands on lines of its own.
    """

    outer_open: str
    outer_close: str
    name_open: str
    name_close: str
    key_open: str
    key_close: str
    value_open: str
    value_close: str
    call_close: str
    on_lines: bool

    @property
    def all(self) -> tuple[str, ...]:
        """What must be seen in the text."""
        found = (
            self.outer_open, self.outer_close, self.name_open, self.key_open, self.key_close, self.value_open,
            self.value_close, self.call_close,
        )  # fmt: skip
        return tuple(dict.fromkeys(tag for tag in found if len(tag) > 1))


QWEN3_CODER = Tags(
    "<tool_call>", "</tool_call>", "<function=", ">", "<parameter=", ">", "", "</parameter>", "</function>", True
)  # fmt: skip
GLM45 = Tags(
    "<tool_call>", "</tool_call>", "", "", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "</tool_call>",
    False,
)  # fmt: skip


class _In(Enum):
    TEXT = auto()
    HEAD = auto()  # after the opening tag, before the name
    NAME = auto()
    BETWEEN = auto()
    KEY = auto()
    BEFORE_VALUE = auto()
    VALUE = auto()
    AFTER = auto()


class TaggedParser:
    """Any number of calls, between any text.

    What stands in a tag and calls none of the functions is content, tag included. A call that goes on with something
    else than a parameter ends there. White space before a call, and after the last one, is dropped.
    """

    def __init__(self, tags: Tags, functions: Mapping[str, Mapping[str, Any] | None]) -> None:
        """functions: the schema of the parameters of each that may be called, by name."""
        self._tags, self._functions = tags, functions
        self._in = _In.TEXT
        self._found = EventList()
        self._content = SpacedContent(self._found)
        self._raw = ""  # of a call, until its name is known
        self._text = ""  # a tag, a name or a key being read
        self._newline = ""  # a line's end inside a value, which may be its last
        self._at_start = False  # of a value
        self._finder = self._opening()
        self._arguments = ArgumentWriter(None)
        self._count = 0

    def push(self, text: str) -> list[Event]:
        """The events of these further characters."""
        for character in text:
            self._step(character)
        return self._found.take()

    def finish(self) -> list[Event]:
        """What is left at the end."""
        match self._in:
            case _In.TEXT:
                self._content.write(self._finder.flush())
            case _In.HEAD | _In.NAME:
                self._content.write(self._raw)
            case _In.VALUE:
                self._give(self._value(self._finder.flush()) + self._arguments.cut_off())
        if self._count == 0:
            self._content.keep_spaces()
        return self._found.take()

    def _opening(self) -> TagFinder:
        # Qwen3-Coder forgets the outer tag now and then.
        return TagFinder(*filter(None, (self._tags.outer_open, self._tags.name_open)))

    def _step(self, character: str) -> None:
        tags = self._tags
        match self._in:
            case _In.TEXT:
                self._content.write(self._finder.push(character))
                if self._finder.found:
                    self._raw, self._text = self._finder.which, ""
                    named = not tags.name_open or self._finder.which == tags.name_open
                    self._in = _In.NAME if named else _In.HEAD
            case _In.HEAD:
                self._raw += character
                if self._reads(character, tags.name_open) is False:
                    self._give_up()
                elif self._text == tags.name_open:
                    self._in, self._text = _In.NAME, ""
            case _In.NAME:
                self._raw += character
                self._read_name(character)
            case _In.BETWEEN:
                self._read_between(character)
            case _In.KEY:
                self._text += self._finder.push(character)
                if self._finder.found:
                    key, self._text = self._text.strip(), ""
                    self._give(self._arguments.begin(key))
                    self._in = _In.BEFORE_VALUE if tags.value_open else _In.VALUE
                    self._begin_value()
            case _In.BEFORE_VALUE:
                if self._reads(character, tags.value_open) is False:
                    self._give(self._arguments.end())
                    self._end_call(self._text)
                elif self._text == tags.value_open:
                    self._in = _In.VALUE
            case _In.VALUE:
                self._give(self._value(self._finder.push(character)))
                if self._finder.found:
                    self._newline = ""
                    self._give(self._arguments.end())
                    self._in, self._text = _In.BETWEEN, ""
            case _In.AFTER:
                if self._reads(character, tags.outer_close) is False:
                    self._to_text(self._text)
                elif self._text == tags.outer_close:
                    self._to_text("")

    def _reads(self, character: str, *wanted: str) -> bool:
        """Adds a character to a tag that may have white space before it; whether it can still be one of these."""
        if not self._text and character.isspace():
            return True
        self._text += character
        return any(tag.startswith(self._text) for tag in wanted)

    def _read_name(self, character: str) -> None:
        tags = self._tags
        if tags.name_close:
            ends = character == tags.name_close
        else:
            if not self._text and character.isspace():
                return
            ends = character.isspace() or character == "<"
        if not ends:
            self._text += character
            if not any(name.startswith(self._text) for name in self._functions):
                self._give_up()
        elif self._text in self._functions:
            self._begin_call(self._text)
            if not tags.name_close:
                self._step(character)
        else:
            self._give_up()

    def _begin_call(self, name: str) -> None:
        self._content.drop_spaces()
        self._found.add(CallBegin(self._count, name))
        self._count += 1
        self._arguments = ArgumentWriter(self._functions[name])
        self._in, self._text, self._raw = _In.BETWEEN, "", ""

    def _read_between(self, character: str) -> None:
        tags = self._tags
        if not self._reads(character, tags.key_open, tags.call_close, tags.outer_close):
            self._end_call(self._text)
        elif self._text == tags.key_open:
            self._in, self._text, self._finder = _In.KEY, "", TagFinder(tags.key_close)
        elif self._text == tags.outer_close:
            self._end_call("")
        elif self._text == tags.call_close:
            self._give(self._arguments.close())
            self._in, self._text = _In.AFTER, ""

    def _begin_value(self) -> None:
        self._finder = TagFinder(self._tags.value_close)
        self._at_start, self._newline, self._text = True, "", ""

    def _value(self, text: str) -> str:
        """The arguments' text of more of a value, without the line ends around it."""
        if not self._tags.on_lines:
            return self._arguments.push(text) if text else ""
        given = ""
        for character in text:
            is_first, self._at_start = self._at_start, False
            if is_first and character == "\n":
                continue
            given += self._newline
            self._newline = character if character == "\n" else ""
            given += "" if self._newline else character
        return self._arguments.push(given) if given else ""

    def _end_call(self, rest: str) -> None:
        """The call is over; `rest` stands after it."""
        self._give(self._arguments.close())
        self._to_text(rest)

    def _give_up(self) -> None:
        """What was read is no call: it is text, but its last character may begin something else."""
        raw, last = self._raw[:-1], self._raw[-1]
        self._in, self._raw, self._finder = _In.TEXT, "", self._opening()
        self._content.write(raw)
        self._step(last)

    def _to_text(self, rest: str) -> None:
        self._in, self._text, self._finder = _In.TEXT, "", self._opening()
        for character in rest:
            self._step(character)

    def _give(self, text: str) -> None:
        if text:
            self._found.add(CallArguments(self._count - 1, text))
