"""Calls as a list of Python calls, `[f(a=1), g(b="x")]`: Llama 3.2's and Llama 4's format."""

from __future__ import annotations

import ast
import json
from collections.abc import Collection
from enum import Enum, auto

from mainspring.engine.server.tool_calls.events import (
    CallArguments,
    CallBegin,
    Content,
    Event,
    EventList,
    ToolCall,
)

# A call is handed to Python's parser whole, so its length is bounded.
MAX_CALL_CHARACTERS = 200_000
_OPENING = "([{"
_CLOSING = ")]}"


class _In(Enum):
    START = auto()
    CALL = auto()
    AFTER_CALL = auto()
    TEXT = auto()


class PythonicParser:
    """The text is one list of calls with keyword arguments, or it is content.

    A call comes out whole, when its closing bracket has been read. What follows the last complete call and is
    none is content.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)
        self._in = _In.START
        self._raw: list[str] = []  # what was read since the last complete call
        self._call: list[str] = []
        self._name = ""
        self._depth = 0
        self._quote = ""
        self._escaped = False
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
        if self._in in (_In.START, _In.CALL):
            self._found.add(Content("".join(self._raw)))
        return self._found.take()

    def _step(self, character: str) -> None:
        self._raw.append(character)
        match self._in:
            case _In.START:
                if character == "[":
                    self._in = _In.CALL
                elif not character.isspace():
                    self._give_up()
            case _In.CALL:
                self._read_call(character)
            case _In.AFTER_CALL:
                if character == ",":
                    self._in, self._call, self._name = _In.CALL, [], ""
                elif not character.isspace() and character != "]":
                    self._give_up()

    def _read_call(self, character: str) -> None:
        self._call.append(character)
        if len(self._call) > MAX_CALL_CHARACTERS:
            self._give_up()
        elif self._quote:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == self._quote:
                self._quote = ""
        elif self._depth == 0:
            # Before the bracket stands the name, and nothing else.
            if character == "(" and self._name in self._names:
                self._depth = 1
            elif not character.isspace():
                self._name += character
                if not any(known.startswith(self._name) for known in self._names):
                    self._give_up()
        elif character in "'\"":
            self._quote = character
        elif character in _OPENING:
            self._depth += 1
        elif character in _CLOSING:
            self._depth -= 1
            if self._depth == 0:
                self._end_call()

    def _end_call(self) -> None:
        call = _call_of("".join(self._call).strip())
        if call is None:
            self._give_up()
            return
        self._found.add(CallBegin(self._count, call.name))
        self._found.add(CallArguments(self._count, call.arguments))
        self._count += 1
        self._in, self._raw = _In.AFTER_CALL, []

    def _give_up(self) -> None:
        self._found.add(Content("".join(self._raw)))
        self._in, self._raw = _In.TEXT, []


def _call_of(source: str) -> ToolCall | None:
    """The call that a Python expression makes; None unless it is a name and keywords with literal values."""
    try:
        expression = ast.parse(source, mode="eval").body
        if not isinstance(expression, ast.Call) or expression.args:
            return None
        arguments = {}
        for keyword in expression.keywords:
            if keyword.arg is None:
                return None
            arguments[keyword.arg] = ast.literal_eval(keyword.value)
        return ToolCall(ast.unparse(expression.func), json.dumps(arguments, ensure_ascii=False))
    # Python's parser gives up on deep nesting with a MemoryError or a RecursionError.
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None
