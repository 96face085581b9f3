"""Separates what a model thinks, between <think> and </think>, from what it answers."""

from __future__ import annotations

from enum import Enum, auto

from mainspring.engine.server.tool_calls.events import Event, EventList, Parser, Reasoning
from mainspring.engine.server.tool_calls.tag_finder import TagFinder

OPEN = "<think>"
CLOSE = "</think>"


def prompt_opens_reasoning(prompt: str) -> bool:
    """Whether the chat template has written the opening tag already, so that the model's text begins inside."""
    return prompt.rstrip().endswith(OPEN)


class _In(Enum):
    START = auto()
    REASONING = auto()
    BEFORE_ANSWER = auto()
    ANSWER = auto()


class ReasoningParser:
    """Gives reasoning as such and the rest to `inner`, without the white space around the tags.

    Reasoning stands at the beginning of the text or nowhere; text that ends inside it holds no answer.
    """

    def __init__(self, inner: Parser, *, opened: bool) -> None:
        """`opened`: the text begins inside the reasoning (`prompt_opens_reasoning`)."""
        self._inner = inner
        self._in = _In.REASONING if opened else _In.START
        self._tag = ""  # what may be the beginning of the opening tag
        self._spaces: list[str] = []  # white space before that tag, or at the end of the reasoning so far
        self._began = False
        self._close = TagFinder(CLOSE)

    def push(self, text: str) -> list[Event]:
        """The events of these further characters."""
        found = EventList()
        for index, character in enumerate(text):
            if self._in is _In.ANSWER:
                found.extend(self._inner.push(text[index:]))
                break
            self._step(character, found)
        return found.take()

    def finish(self) -> list[Event]:
        """What is left at the end."""
        found = EventList()
        if self._in is _In.START:
            found.extend(self._inner.push("".join(self._spaces) + self._tag))
        elif self._in is _In.REASONING:
            self._reason(self._close.flush(), found)
        found.extend(self._inner.finish())
        return found.take()

    def _step(self, character: str, found: EventList) -> None:
        match self._in:
            case _In.START if character.isspace() and not self._tag:
                self._spaces.append(character)
            case _In.START:
                self._tag += character
                if self._tag == OPEN:
                    self._spaces, self._in = [], _In.REASONING
                elif not OPEN.startswith(self._tag):
                    self._in = _In.ANSWER
                    found.extend(self._inner.push("".join(self._spaces) + self._tag))
            case _In.REASONING:
                self._reason(self._close.push(character), found)
                if self._close.found:
                    self._in = _In.BEFORE_ANSWER
            case _ if not character.isspace():
                self._in = _In.ANSWER
                found.extend(self._inner.push(character))

    def _reason(self, text: str, found: EventList) -> None:
        """Hands out reasoning; white space at its beginning goes, and at its end waits for more."""
        for character in text:
            if not character.isspace():
                found.add(Reasoning("".join(self._spaces) + character))
                self._spaces, self._began = [], True
            elif self._began:
                self._spaces.append(character)
