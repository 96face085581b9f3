"""What a parser finds in a model's text, and what a whole answer is made of.

Every parser here is a machine that reads one character after another: how the text was cut into pieces
cannot change what is found.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeAlias


@dataclass(frozen=True, slots=True)
class Reasoning:
    """More of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A tool call begins: the `index`-th of this answer."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments: JSON text, as the model wrote it."""

    index: int
    text: str


Event: TypeAlias = Reasoning | Content | CallBegin | CallArguments


class Parser(Protocol):
    """Reads a text that comes in pieces."""

    def push(self, text: str) -> list[Event]:
        """What these further characters make certain."""

    def finish(self) -> list[Event]:
        """What is left when no more text comes."""


@dataclass(slots=True)
class ToolCall:
    """One complete call. `arguments`: JSON text; invalid only if the model wrote it so or was cut off."""

    name: str
    arguments: str = ""


@dataclass(slots=True)
class Answer:
    """All that the events of one text say."""

    reasoning: str = ""
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)

    def take(self, events: Iterable[Event]) -> None:
        """Adds what the events say."""
        for event in events:
            match event:
                case Reasoning(text):
                    self.reasoning += text
                case Content(text):
                    self.content += text
                case CallBegin(_, name):
                    self.calls.append(ToolCall(name))
                case CallArguments(index, text):
                    self.calls[index].arguments += text


def parse_whole(parser: Parser, text: str) -> Answer:
    """The answer in a complete text."""
    answer = Answer()
    answer.take(parser.push(text))
    answer.take(parser.finish())
    return answer


class EventList:
    """Events in order, neighbours of one kind joined. Adding takes constant time."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._texts: list[list[str]] = []  # of each event, the pieces of its text

    def add(self, event: Event) -> None:
        """Appends an event, or lengthens the last one by it; empty texts are dropped."""
        if isinstance(event, CallBegin):
            self._events.append(event)
            self._texts.append([])
            return
        if not event.text:
            return
        if self._events and _same_kind(self._events[-1], event):
            self._texts[-1].append(event.text)
        else:
            self._events.append(event)
            self._texts.append([event.text])

    def extend(self, events: Iterable[Event]) -> None:
        """Adds several."""
        for event in events:
            self.add(event)

    def take(self) -> list[Event]:
        """The events so far; the list is then empty."""
        taken = [
            event if isinstance(event, CallBegin) else replace(event, text="".join(texts))
            for event, texts in zip(self._events, self._texts, strict=True)
        ]
        self._events, self._texts = [], []
        return taken


def _same_kind(one: Event, other: Event) -> bool:
    if isinstance(one, CallArguments) and isinstance(other, CallArguments):
        return one.index == other.index
    return type(one) is type(other)
