"""Which format a model writes its calls in, and the parser of one answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from mainspring.engine.server.tool_calls import bare_json, hermes, reasoning, tagged
from mainspring.engine.server.tool_calls.bare_json import BareJsonParser
from mainspring.engine.server.tool_calls.events import Parser
from mainspring.engine.server.tool_calls.hermes import HermesParser
from mainspring.engine.server.tool_calls.pythonic import PythonicParser
from mainspring.engine.server.tool_calls.reasoning import ReasoningParser, prompt_opens_reasoning
from mainspring.engine.server.tool_calls.tagged import TaggedParser
from mainspring.engine.server.tool_calls.text import NamedCall, PlainText
from mainspring.errors import ConfigError

ToolFormat: TypeAlias = Literal["hermes", "llama3_json", "pythonic", "qwen3_coder", "glm45"]
TOOL_FORMATS: tuple[ToolFormat, ...] = get_args(ToolFormat)


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
    # These put something else than JSON into the tags of Hermes.
    if tagged.QWEN3_CODER.name_open in source and tagged.QWEN3_CODER.key_open in source:
        return "qwen3_coder"
    if tagged.GLM45.key_open in source:
        return "glm45"
    if hermes.OPEN in source and "<function=" not in source:
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
        functions: what may be called, by name: the schema of each function's parameters.
        reasons: look for reasoning first; `opened`: the prompt has opened it already.
    """

    mode: Literal["text", "auto", "required", "named"] = "text"
    functions: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)
    tools: ToolFormat | None = None
    reasons: bool = False
    opened: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        """What the parser looks for. Where these are special tokens, the text must keep them."""
        marks: tuple[str, ...] = (reasoning.OPEN, reasoning.CLOSE) if self.reasons else ()
        return marks + (marks_of(self.tools) if self.mode == "auto" else ())

    def parser(self) -> Parser:
        """A fresh parser."""
        inner = self._calls()
        return ReasoningParser(inner, opened=self.opened) if self.reasons else inner

    def _calls(self) -> Parser:
        match self.mode:
            case "text":
                return PlainText()
            case "named":
                return NamedCall(next(iter(self.functions)))
            case "required":
                return BareJsonParser(self.functions)
            case "auto":
                return _parser_of(self.tools, self.functions)


def marks_of(tools: ToolFormat | None) -> tuple[str, ...]:
    """What a format's parser looks for."""
    match tools:
        case "hermes":
            return (hermes.OPEN, hermes.CLOSE)
        case "llama3_json":
            return (bare_json.PYTHON_TAG,)
        case "qwen3_coder":
            return tagged.QWEN3_CODER.all
        case "glm45":
            return tagged.GLM45.all
        case _:
            return ()


def _parser_of(tools: ToolFormat | None, functions: Mapping[str, Mapping[str, Any] | None]) -> Parser:
    match tools:
        case None:
            return PlainText()
        case "hermes":
            return HermesParser()
        case "llama3_json":
            return BareJsonParser(functions)
        case "pythonic":
            return PythonicParser(functions)
        case "qwen3_coder":
            return TaggedParser(tagged.QWEN3_CODER, functions)
        case "glm45":
            return TaggedParser(tagged.GLM45, functions)


__all__ = [
    "TOOL_FORMATS",
    "AnswerFormat",
    "AnswerPlan",
    "ToolFormat",
    "check_names",
    "detect",
    "marks_of",
    "prompt_opens_reasoning",
]
