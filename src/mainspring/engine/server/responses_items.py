"""The items of a response: those of its input become a conversation, the model's text becomes those of its output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mainspring.engine.server.conversation import function_of
from mainspring.engine.server.openai_types import TokenLogprob
from mainspring.engine.server.responses_types import (
    InputCall,
    InputCallOutput,
    InputItem,
    InputMessage,
    InputReasoning,
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    OutputText,
    ReasoningText,
    Status,
    StreamEvent,
    TextPart,
)
from mainspring.engine.server.service import new_id
from mainspring.engine.server.tool_calls.events import CallArguments, CallBegin, Content, Event, Reasoning


def turns_of(items: str | Sequence[InputItem], instructions: str | None) -> list[dict[str, Any]]:
    """The conversation as chat templates expect it: an assistant's thoughts, text and calls make one message.

    Raises: InvalidRequestError, if a call's arguments are not JSON.
    """
    turns: list[dict[str, Any]] = []
    if instructions:
        turns.append({"role": "system", "content": instructions})
    if isinstance(items, str):
        return [*turns, {"role": "user", "content": items}]
    open_turn = False  # the last turn is an assistant's, and more may join it
    for item in items:
        if isinstance(item, InputCallOutput):
            turns.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
            open_turn = False
        elif isinstance(item, InputMessage) and item.role != "assistant":
            role = "system" if item.role == "developer" else item.role
            turns.append({"role": role, "content": _text(item.content)})
            open_turn = False
        else:
            if not open_turn or (isinstance(item, InputReasoning) and "reasoning_content" in turns[-1]):
                turns.append({"role": "assistant", "content": ""})
                open_turn = True
            _join(turns[-1], item)
    return turns


def _join(turn: dict[str, Any], item: InputMessage | InputCall | InputReasoning) -> None:
    """Adds an item to an assistant's message."""
    match item:
        case InputMessage():
            turn["content"] += _text(item.content)
        case InputReasoning():
            turn["reasoning_content"] = _text(item.content or item.summary or [])
        case InputCall():
            call = {
                "id": item.call_id,
                "type": "function",
                "function": function_of(item.name, item.arguments),
            }
            turn.setdefault("tool_calls", []).append(call)


def _text(content: str | Sequence[TextPart]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


class OutputItems:
    """The items of one answer as its text comes in, and the stream's events that tell of them.

    At most one item is open, the last.
    """

    def __init__(self) -> None:
        self.items: list[OutputItem] = []
        self._open = False
        self._number = 0
        self._events: list[StreamEvent] = []

    def event(self, kind: str, **fields: Any) -> StreamEvent:
        """An event with the next number."""
        self._number += 1
        return StreamEvent(type=f"response.{kind}", sequence_number=self._number - 1, **fields)

    def take(self, events: Sequence[Event], logprobs: Sequence[TokenLogprob]) -> list[StreamEvent]:
        """Adds what the parser has found; `logprobs` belong to the first content among it."""
        for event in events:
            match event:
                case Reasoning(text):
                    self._reason(text)
                case Content(text):
                    self._write(text, logprobs)
                    logprobs = ()
                case CallBegin(_, name):
                    self._begin(OutputCall(new_id("fc"), new_id("call"), name))
                case CallArguments(_, text):
                    self._argue(text)
        return self._taken()

    def finish(self, status: Status) -> list[StreamEvent]:
        """Closes the last item."""
        self._close(status)
        return self._taken()

    def _taken(self) -> list[StreamEvent]:
        taken, self._events = self._events, []
        return taken

    def _emit(self, kind: str, **fields: Any) -> None:
        self._events.append(self.event(kind, output_index=len(self.items) - 1, **fields))

    def _begin(self, item: OutputItem) -> None:
        self._close("completed")
        self.items.append(item)
        self._open = True
        # What follows changes the item; the event has it as it is now.
        self._emit("output_item.added", item=_empty(item))
        if not isinstance(item, OutputCall):
            part = OutputText("") if isinstance(item, OutputMessage) else ReasoningText("")
            self._emit("content_part.added", item_id=item.id, content_index=0, part=part)

    def _reason(self, text: str) -> None:
        item = self.items[-1] if self._open else None
        if not isinstance(item, OutputReasoning):
            item = OutputReasoning(new_id("rs"), [ReasoningText("")])
            self._begin(item)
        item.content[0].text += text
        self._emit("reasoning_text.delta", item_id=item.id, content_index=0, delta=text)

    def _write(self, text: str, logprobs: Sequence[TokenLogprob]) -> None:
        item = self.items[-1] if self._open else None
        if not isinstance(item, OutputMessage):
            item = OutputMessage(new_id("msg"), [OutputText("")])
            self._begin(item)
        item.content[0].text += text
        item.content[0].logprobs = [*item.content[0].logprobs, *logprobs]
        self._emit("output_text.delta", item_id=item.id, content_index=0, delta=text, logprobs=list(logprobs))

    def _argue(self, text: str) -> None:
        item = self.items[-1]
        if isinstance(item, OutputCall):
            item.arguments += text
            self._emit("function_call_arguments.delta", item_id=item.id, delta=text)

    def _close(self, status: Status) -> None:
        if not self._open:
            return
        self._open = False
        item = self.items[-1]
        item.status = status
        match item:
            case OutputCall():
                self._emit(
                    "function_call_arguments.done", item_id=item.id, name=item.name, arguments=item.arguments
                )
            case OutputMessage():
                part = item.content[0]
                self._emit(
                    "output_text.done",
                    item_id=item.id,
                    content_index=0,
                    text=part.text,
                    logprobs=part.logprobs,
                )
                self._emit("content_part.done", item_id=item.id, content_index=0, part=part)
            case OutputReasoning():
                thought = item.content[0]
                self._emit("reasoning_text.done", item_id=item.id, content_index=0, text=thought.text)
                self._emit("content_part.done", item_id=item.id, content_index=0, part=thought)
        self._emit("output_item.done", item=item)


def _empty(item: OutputItem) -> OutputItem:
    """The item as it begins."""
    match item:
        case OutputCall():
            return OutputCall(item.id, item.call_id, item.name)
        case OutputMessage():
            return OutputMessage(item.id, [])
        case OutputReasoning():
            return OutputReasoning(item.id, [])
