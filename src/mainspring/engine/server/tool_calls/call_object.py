"""Reads one tool call, `{"name": ..., "arguments": {...}}`, character by character.

Only a JSON reader knows where such an object ends: its strings may hold brackets, and the tags around it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from enum import Enum, auto

NAME_KEYS = frozenset({"name"})
# Hermes and Qwen write "arguments", Llama 3 writes "parameters".
ARGUMENT_KEYS = frozenset({"arguments", "parameters"})
_CLOSING = {"{": "}", "[": "]"}
_SPACE = " \t\r\n"
# Raw control characters are no JSON inside a string, but models write them.
_ESCAPED = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\b": "\\b", "\f": "\\f"}


class _At(Enum):
    START = auto()
    KEY = auto()
    IN_KEY = auto()
    COLON = auto()
    VALUE = auto()
    IN_STRING = auto()
    IN_NESTED = auto()
    IN_SCALAR = auto()
    AFTER_VALUE = auto()
    COMPLETE = auto()
    FAILED = auto()


class CallObject:
    """Push characters until `complete` or `failed`.

    Attributes:
        name: the function's name, once known.
    """

    def __init__(self, names: Collection[str] | None) -> None:
        """`names`: functions that may be called; None admits any."""
        self.name: str | None = None
        self._names = names
        self._at = _At.START
        self._text: list[str] = []  # the key, string or scalar being read, with its quotes
        self._key = ""
        self._escaped = False
        self._in_string = False  # inside a nested value
        self._closers: list[str] = []
        self._is_arguments = False
        self._has_arguments = False
        self._given: list[str] = []  # arguments that have not been returned: those before the name wait

    @property
    def complete(self) -> bool:
        """The closing bracket has been read, and there is a name."""
        return self._at is _At.COMPLETE

    @property
    def failed(self) -> bool:
        """What was read cannot become a call any more."""
        return self._at is _At.FAILED

    def push(self, character: str) -> str:
        """Takes one character; returns what it adds to the arguments of a call whose name is known."""
        self._step(character)
        if self.name is None:
            return ""
        given, self._given = self._given, []
        return "".join(given)

    def _step(self, character: str) -> None:
        match self._at:
            case _At.IN_KEY:
                self._read_string(character, self._end_key)
            case _At.IN_STRING:
                self._read_value_string(character)
            case _At.IN_NESTED:
                self._read_nested(character)
            case _At.IN_SCALAR if character not in ",}" and character not in _SPACE:
                self._text.append(character)
            case _At.IN_SCALAR:
                self._end_scalar()
                self._step(character)
            case _At.COMPLETE | _At.FAILED:
                raise ValueError("this call has ended")
            case _ if character in _SPACE:
                return
            case _At.START if character == "{":
                self._at = _At.KEY
            case _At.KEY if character == '"':
                self._text, self._at = [character], _At.IN_KEY
            case _At.COLON if character == ":":
                self._at = _At.VALUE
            case _At.VALUE:
                self._begin_value(character)
            case _At.AFTER_VALUE if character == ",":
                self._at = _At.KEY
            case _At.AFTER_VALUE | _At.KEY if character == "}":
                self._end()
            case _:
                self._at = _At.FAILED

    def _read_string(self, character: str, end: Callable[[], None]) -> None:
        self._text.append(character)
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            end()

    def _end_key(self) -> None:
        self._key = _decoded(self._text) or ""
        self._at = _At.COLON

    def _begin_value(self, character: str) -> None:
        self._is_arguments = self._key in ARGUMENT_KEYS and not self._has_arguments
        self._has_arguments |= self._is_arguments
        if character == '"':
            self._text, self._at = [character], _At.IN_STRING
            self._give(character)
        elif self._key in NAME_KEYS:
            self._at = _At.FAILED
        elif character in _CLOSING:
            self._closers, self._at = [_CLOSING[character]], _At.IN_NESTED
            self._give(character)
        elif character in ",}]:":
            self._at = _At.FAILED
        else:
            self._text, self._at = [character], _At.IN_SCALAR

    def _read_value_string(self, character: str) -> None:
        self._give(_ESCAPED.get(character, character))
        self._read_string(character, self._end_value_string)

    def _end_value_string(self) -> None:
        self._at = _At.AFTER_VALUE
        if self._key in NAME_KEYS and self.name is None:
            name = _decoded(self._text)
            if not name or (self._names is not None and name not in self._names):
                self._at = _At.FAILED
            else:
                self.name = name

    def _read_nested(self, character: str) -> None:
        if self._in_string:
            self._give(_ESCAPED.get(character, character))
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self._in_string = False
            return
        if character in "}]" and character != self._closers[-1]:
            self._at = _At.FAILED
            return
        self._give(character)
        if character == '"':
            self._in_string = True
        elif character in _CLOSING:
            self._closers.append(_CLOSING[character])
        elif character in "}]":
            self._closers.pop()
            if not self._closers:
                self._at = _At.AFTER_VALUE

    def _end_scalar(self) -> None:
        # A function without parameters may be called with null.
        text = "".join(self._text)
        self._give("{}" if text == "null" else text)
        self._at = _At.AFTER_VALUE

    def _end(self) -> None:
        if self.name is None:
            self._at = _At.FAILED
            return
        self._at = _At.COMPLETE
        if not self._has_arguments:
            self._given.append("{}")

    def _give(self, text: str) -> None:
        if self._is_arguments:
            self._given.append(text)


def _decoded(literal: list[str]) -> str | None:
    """The string that the characters of a JSON string literal stand for; None if it is none."""
    try:
        value = json.loads("".join(literal), strict=False)
    except ValueError:
        return None
    return value if isinstance(value, str) else None
