"""What is found in a model's text: reasoning, content and calls, however the text is cut into pieces."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mainspring.engine.server.tool_calls.bare_json import BareJsonParser
from mainspring.engine.server.tool_calls.events import Answer, Content, Parser, Reasoning, parse_whole
from mainspring.engine.server.tool_calls.formats import AnswerPlan, detect
from mainspring.engine.server.tool_calls.hermes import HermesParser
from mainspring.engine.server.tool_calls.pythonic import PythonicParser
from mainspring.engine.server.tool_calls.reasoning import ReasoningParser, prompt_opens_reasoning
from mainspring.engine.server.tool_calls.schema import calls_schema
from mainspring.engine.server.tool_calls.tagged import GLM45, QWEN3_CODER, TaggedParser
from mainspring.engine.server.tool_calls.text import NamedCall, PlainText
from mainspring.errors import ConfigError

NAMES = ("f", "get_weather", "get")
FUNCTIONS = dict.fromkeys(NAMES)
# Delimiters of every format inside strings are what a parser may stumble over.
TRICKY = st.sampled_from(
    [
        "</tool_call>",
        "<tool_call>",
        '{"name": "f"}',
        "}}]",
        '"',
        "\\",
        "\n",
        "; {",
        "<|python_tag|>",
        "</think>",
    ]
)
STRINGS = (
    st.lists(st.one_of(TRICKY, st.text(max_size=4)), max_size=4)
    .map("".join)
    .filter(lambda text: text.isprintable() or "\n" in text)
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-1000, 1000), st.floats(-9, 9), STRINGS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(STRINGS, inner, max_size=3)),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(st.sampled_from(["a", "city", "unit"]), VALUES, max_size=3)
CALLS = st.lists(st.tuples(st.sampled_from(NAMES), ARGUMENTS), min_size=1, max_size=3)


def hermes_text(calls: list[tuple[str, Any]]) -> str:
    return "\n".join(
        f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"
        for name, arguments in calls
    )


def llama_text(calls: list[tuple[str, Any]]) -> str:
    return "; ".join(json.dumps({"name": name, "parameters": arguments}) for name, arguments in calls)


def list_text(calls: list[tuple[str, Any]]) -> str:
    return json.dumps([{"arguments": arguments, "name": name} for name, arguments in calls])


def pythonic_text(calls: list[tuple[str, Any]]) -> str:
    written = [f"{name}({', '.join(f'{k}={v!r}' for k, v in kw.items())})" for name, kw in calls]
    return f"[{', '.join(written)}]"


FORMATS: dict[str, tuple[Callable[[], Parser], Callable[[list[tuple[str, Any]]], str]]] = {
    "hermes": (HermesParser, hermes_text),
    "llama": (lambda: BareJsonParser(NAMES), llama_text),
    "list": (lambda: BareJsonParser(NAMES), list_text),
    "pythonic": (lambda: PythonicParser(NAMES), pythonic_text),
    "thinking hermes": (lambda: ReasoningParser(HermesParser(), opened=False), hermes_text),
}


def parse_pieces(parser: Parser, text: str, cuts: list[int]) -> Answer:
    """The answer in a text that comes in pieces."""
    answer = Answer()
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    for start, end in itertools.pairwise(places):
        answer.take(parser.push(text[start:end]))
    answer.take(parser.finish())
    return answer


@pytest.mark.parametrize("name", FORMATS)
@given(calls=CALLS, cuts=st.lists(st.integers(0, 10_000), max_size=12))
@settings(max_examples=60, deadline=None)
def test_calls_are_found_whole_however_the_text_is_cut(
    name: str, calls: list[tuple[str, Any]], cuts: list[int]
) -> None:
    new_parser, write = FORMATS[name]
    found = parse_pieces(new_parser(), write(calls), cuts)
    assert [(call.name, json.loads(call.arguments)) for call in found.calls] == calls
    assert found.content == ""


FRAGMENTS = st.sampled_from(
    ["<tool_call>", "</tool_call>", "<tool", "_call>", '{"name": "f", "arguments": ', '{"name": "f"}', "{", "}", "[",
     "]", '"', "\\", ", ", "; ", "\n", " ", "a", '{"a": 1}', "null}", "<think>", "</think>", "<|python_tag|>", "[f(",
     "f(a=1)", "get(", "b='", ")", "'", "]]", "<function=", "f>", "<parameter=a>", "</parameter>", "</function>", "f\n",
     "<arg_key>a</arg_key>", "<arg_value>", "</arg_value>"]
)  # fmt: skip


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize(
    "inner",
    [
        HermesParser,
        lambda: BareJsonParser(NAMES),
        lambda: PythonicParser(NAMES),
        lambda: TaggedParser(QWEN3_CODER, FUNCTIONS),
        lambda: TaggedParser(GLM45, FUNCTIONS),
        PlainText,
    ],
)
@given(text=st.lists(FRAGMENTS, max_size=14).map("".join), cuts=st.lists(st.integers(0, 500), max_size=8))
@settings(max_examples=60, deadline=None)
def test_any_text_means_the_same_in_pieces_and_as_a_whole(
    inner: Callable[[], Parser], opened: bool, text: str, cuts: list[int]
) -> None:
    def parser() -> Parser:
        return ReasoningParser(inner(), opened=opened)

    whole = parse_whole(parser(), text)
    assert parse_pieces(parser(), text, cuts) == whole
    assert parse_pieces(parser(), text, list(range(len(text)))) == whole


@given(text=st.lists(st.one_of(FRAGMENTS, st.text(max_size=3)), max_size=10).map("".join))
@settings(max_examples=100, deadline=None)
def test_text_without_a_call_is_content_to_the_letter(text: str) -> None:
    tagged = (TaggedParser(QWEN3_CODER, FUNCTIONS), TaggedParser(GLM45, FUNCTIONS))
    for parser in (HermesParser(), BareJsonParser(NAMES), PythonicParser(NAMES), *tagged):
        answer = parse_whole(parser, text)
        if not answer.calls:
            assert answer.content == text


def test_a_call_streams_its_arguments_as_they_come() -> None:
    parser = HermesParser()
    head = '<tool_call>{"name": "f", "arguments": {"text": "'
    answer = Answer()
    answer.take(parser.push(head))
    assert [(call.name, call.arguments) for call in answer.calls] == [("f", '{"text": "')]
    answer.take(parser.push("abc"))
    assert answer.calls[0].arguments == '{"text": "abc'


def test_text_around_calls_stays_and_the_white_space_between_goes() -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    answer = parse_whole(HermesParser(), f"Let me look.\n\n{call}\n{call}\n Done.\n")
    assert answer.content == "Let me look.\n Done."
    assert len(answer.calls) == 2


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('{"name": "f"}', "{}"),
        ('{"name": "f", "arguments": null}', "{}"),
        ('{"arguments": {"a": 1}, "name": "f"}', '{"a": 1}'),
        ('{"id": 7, "name": "f", "arguments": {"a": [1, {"b": "}"}]}, "x": "y"}', '{"a": [1, {"b": "}"}]}'),
        ('{"name": "f", "arguments": {"a": "one\ntwo"}}', '{"a": "one\\ntwo"}'),
    ],
)
def test_the_forms_of_one_call(text: str, arguments: str) -> None:
    (call,) = parse_whole(HermesParser(), f"<tool_call>\n{text}\n</tool_call>").calls
    assert (call.name, call.arguments) == ("f", arguments)


def test_a_list_of_calls_in_one_tag() -> None:
    text = '<tool_call>[{"name": "f", "arguments": {"a": 1}}, {"name": "g"}]</tool_call> ok'
    answer = parse_whole(HermesParser(), text)
    assert [(call.name, call.arguments) for call in answer.calls] == [("f", '{"a": 1}'), ("g", "{}")]
    assert answer.content.strip() == "ok"


@pytest.mark.parametrize(
    "text", ["<tool_call>no</tool_call>", '<tool_call>{"a": 1}</tool_call>', "<tool_call>", "<tool_", '<tool_call>{"n']
)  # fmt: skip
def test_a_tag_without_a_call_is_content(text: str) -> None:
    assert parse_whole(HermesParser(), text) == Answer(content=text)


def test_a_second_opening_tag_begins_anew() -> None:
    answer = parse_whole(HermesParser(), '<tool_call>\n<tool_call>{"name": "f"}</tool_call>')
    assert [call.name for call in answer.calls] == ["f"]


def test_json_that_breaks_after_its_name_keeps_what_was_written() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": 1]} oh</tool_call>after'
    answer = parse_whole(HermesParser(), text)
    assert [(call.name, call.arguments) for call in answer.calls] == [("f", '{"a": 1]} oh')]
    assert answer.content == "after"


def test_a_call_that_is_cut_off_keeps_what_there_is() -> None:
    answer = parse_whole(HermesParser(), '<tool_call>{"name": "f", "arguments": {"a": "x')
    assert [(call.name, call.arguments) for call in answer.calls] == [("f", '{"a": "x')]


@pytest.mark.parametrize(
    "text", ['{"name": "Alice", "age": 3}', '{"answer": 42}', "[1, 2]", "Hello {", '{"name": "f', "<|python", "{}"]
)  # fmt: skip
def test_json_that_calls_no_function_we_have_is_content(text: str) -> None:
    assert parse_whole(BareJsonParser(NAMES), text) == Answer(content=text)


def test_llama_s_python_tag_begins_calls() -> None:
    answer = parse_whole(BareJsonParser(NAMES), '<|python_tag|>{"name": "f", "parameters": {"a": "; {"}}')
    assert [(call.name, call.arguments) for call in answer.calls] == [("f", '{"a": "; {"}')]


@pytest.mark.parametrize(
    "text", ["[f(1)]", "[unknown(a=1)]", "[f(a=b)]", "[f(a=1", "[]", "[f(**{})]", "f(a=1)"]
)
def test_python_that_is_no_list_of_calls_is_content(text: str) -> None:
    assert parse_whole(PythonicParser(NAMES), text) == Answer(content=text)


def test_reasoning_is_separated_from_the_answer() -> None:
    parser = ReasoningParser(PlainText(), opened=False)
    assert parser.push("\n<think>\n one\n") == [Reasoning("one")]
    assert parser.push("two </th") == [Reasoning("\ntwo")]
    assert parser.push("ink>\n\nYes </think> <think>") == [Content("Yes </think> <think>")]
    opened = parse_whole(ReasoningParser(PlainText(), opened=True), "so </thin so</think> No")
    assert opened == Answer(reasoning="so </thin so", content="No")
    cut = parse_whole(ReasoningParser(PlainText(), opened=False), "<think>and then </thi")
    assert cut == Answer(reasoning="and then </thi")
    plain = parse_whole(ReasoningParser(PlainText(), opened=False), " <thin air>")
    assert plain == Answer(content=" <thin air>")


def test_the_prompt_tells_whether_reasoning_has_begun() -> None:
    assert prompt_opens_reasoning("<|im_start|>assistant\n<think>\n")
    assert not prompt_opens_reasoning("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_the_format_is_read_off_the_template() -> None:
    qwen = detect("{%- if tools %}<tool_call>{% endif %}<think>", "auto", "auto")
    assert (qwen.tools, qwen.reasons, qwen.presents_tools) == ("hermes", True, True)
    llama = detect('{{ tools }} {"name": function name, "parameters": dictionary}', "auto", "auto")
    assert llama.tools == "llama3_json"
    plain = detect("{{ messages }}", "auto", "auto")
    assert (plain.tools, plain.reasons, plain.presents_tools) == (None, False, False)
    for source, tools in (
        ("<tool_call>\n<function=name>\n<parameter=key>", "qwen3_coder"),
        ("<tool_call>name\n<arg_key>", "glm45"),
        ("<tool_call>\n<function=name>{", None),
    ):
        assert detect(source, "auto", "auto").tools == tools
    assert detect(None, "pythonic", "think").tools == "pythonic"
    assert not detect("<tool_call><think>", "none", "none").reasons
    for names in (("qwen", "auto"), ("auto", "deep")):
        with pytest.raises(ConfigError, match="auto, none"):
            detect(None, *names)


def test_a_plan_makes_the_parser_of_its_mode() -> None:
    assert isinstance(AnswerPlan().parser(), PlainText)
    assert isinstance(AnswerPlan(mode="auto", functions=FUNCTIONS, tools="hermes").parser(), HermesParser)
    assert isinstance(AnswerPlan(mode="named", functions={"f": None}).parser(), NamedCall)
    assert isinstance(
        AnswerPlan(mode="required", functions=FUNCTIONS, reasons=True).parser(), ReasoningParser
    )
    answer = parse_whole(AnswerPlan(mode="named", functions={"f": None}).parser(), '{"a": 1}')
    assert [(call.name, call.arguments) for call in answer.calls] == [("f", '{"a": 1}')]


def test_the_schema_of_required_calls_admits_just_those() -> None:
    point = {"type": "array", "items": {"$ref": "#/$defs/Number"}}
    place: dict[str, Any] = {
        "type": "object",
        "properties": {"at": {"$ref": "#/$defs/Point"}},
        "required": ["at"],
        "$defs": {"Point": point, "Number": {"type": "number"}},
    }
    other = {
        "type": "object",
        "properties": {"at": {"$ref": "#/$defs/Point"}},
        "$defs": {"Point": {"type": "string"}},
    }
    schema = calls_schema([("go", place), ("say", other), ("stop", None)], parallel=False)
    holds = jsonschema_rs.validator_for(schema).is_valid
    assert holds([{"name": "go", "arguments": {"at": [1, 2.5]}}])
    assert holds([{"name": "say", "arguments": {"at": "home"}}])
    assert holds([{"name": "stop", "arguments": {}}])
    for wrong in (
        [],
        [{"name": "go", "arguments": {"at": "home"}}],
        [{"name": "say", "arguments": {"at": [1]}}],
        [{"name": "fly", "arguments": {}}],
        [{"name": "stop", "arguments": {"now": True}}],
        [{"name": "stop", "arguments": {}}] * 2,
    ):
        assert not holds(wrong)
    assert point == {"type": "array", "items": {"$ref": "#/$defs/Number"}}
