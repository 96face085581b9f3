"""Which format a model writes its calls in, and the parser of one answer."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from mainspring.engine.server.tool_calls import bare_json, hermes, reasoning
from mainspring.engine.server.tool_calls.bare_json import BareJsonParser
from mainspring.engine.server.tool_calls.events import Parser
from mainspring.engine.server.tool_calls.hermes import HermesParser
from mainspring.engine.server.tool_calls.pythonic import PythonicParser
from mainspring.engine.server.tool_calls.reasoning import ReasoningParser, prompt_opens_reasoning
from mainspring.engine.server.tool_calls.text import NamedCall, PlainText
from mainspring.errors import ConfigError

ToolFormat: TypeAlias = Literal["hermes", "llama3_json", "pythonic"]
TOOL_FORMATS: tuple[ToolFormat, ...] = get_args(ToolFormat)


# Formats that put something else than JSON into the same tags (Qwen3-Coder's, GLM's).
_OTHER_TAGGED = ("<function=", "<arg_key>")


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """How a model writes. Both are read off its chat template unless the user says otherwise.

    Attributes:
        tools: the format of its calls; None: it writes none.
        reasons: it may think between <think> and </think> before it answers.
        presents_tools: its chat template shows tools to the model.
    """

    tools: ToolFormat | None
    reasons: bool
    presents_tools: bool


def check_names(tool_parser: str, reasoning_parser: str) -> None:
    """Raises ConfigError unless `detect` knows these names."""
    for name, value, known in (
        ("tool_parser", tool_parser, ("auto", "none", *TOOL_FORMATS)),
        ("reasoning_parser", reasoning_parser, ("auto", "none", "think")),
    ):
        if value not in known:
            raise ConfigError(f"{name} {value!r} is not one of {', '.join(known)}")


def detect(template: str | None, tool_parser: str, reasoning_parser: str) -> AnswerFormat:
    """The format of a model with that chat template.

    `tool_parser`: "auto", "none" or one of TOOL_FORMATS; `reasoning_parser`: "auto", "none" or "think".

    Raises: ConfigError, for another name.
    """
    check_names(tool_parser, reasoning_parser)
    source = template or ""
    reasons = reasoning_parser == "think" or (
        reasoning_parser == "auto" and (reasoning.OPEN in source or reasoning.CLOSE in source)
    )
    if tool_parser == "auto":
        tools = _of_template(source)
    else:
        tools = next((name for name in TOOL_FORMATS if name == tool_parser), None)
    return AnswerFormat(tools, reasons, "tools" in source)


def _of_template(source: str) -> ToolFormat | None:
    """What the template tells the model to write."""
    if hermes.OPEN in source and not any(mark in source for mark in _OTHER_TAGGED):
        return "hermes"
    if bare_json.PYTHON_TAG in source or '"parameters":' in source:
        return "llama3_json"
    return None


@dataclass(frozen=True, slots=True)
class AnswerPlan:
    """What one request's answers are parsed for; `parser()` makes the parser of one of them.

    Attributes:
        mode: look for no calls, for calls in the model's own format, for a list of them that a grammar
            enforces, or take all text as the arguments of one named call.
        names: the functions that may be called.
        reasons: look for reasoning first; `opened`: the prompt has opened it already.
    """

    mode: Literal["text", "auto", "required", "named"] = "text"
    names: tuple[str, ...] = ()
    tools: ToolFormat | None = None
    reasons: bool = False
    opened: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        """What the parser looks for. Where these are special tokens, the text must keep them."""
        marks: tuple[str, ...] = (reasoning.OPEN, reasoning.CLOSE) if self.reasons else ()
        if self.mode == "auto" and self.tools == "hermes":
            marks += (hermes.OPEN, hermes.CLOSE)
        if self.mode == "auto" and self.tools == "llama3_json":
            marks += (bare_json.PYTHON_TAG,)
        return marks

    def parser(self) -> Parser:
        """A fresh parser."""
        inner = self._calls()
        return ReasoningParser(inner, opened=self.opened) if self.reasons else inner

    def _calls(self) -> Parser:
        match self.mode:
            case "text":
                return PlainText()
            case "named":
                return NamedCall(self.names[0])
            case "required":
                return BareJsonParser(self.names)
            case "auto":
                return _parser_of(self.tools, self.names)


def _parser_of(tools: ToolFormat | None, names: Collection[str]) -> Parser:
    match tools:
        case None:
            return PlainText()
        case "hermes":
            return HermesParser()
        case "llama3_json":
            return BareJsonParser(names)
        case "pythonic":
            return PythonicParser(names)


__all__ = [
    "TOOL_FORMATS",
    "AnswerFormat",
    "AnswerPlan",
    "ToolFormat",
    "check_names",
    "detect",
    "prompt_opens_reasoning",
]
