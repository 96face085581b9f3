"""Calls written in tags, Qwen3-Coder's and GLM-4.5's: values become JSON by the function's schema, as they come."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.server.test_tool_calls import STRINGS, VALUES, parse_pieces
from mainspring.engine.server.tool_calls.argument_values import json_value, types_of
from mainspring.engine.server.tool_calls.events import Answer, parse_whole
from mainspring.engine.server.tool_calls.tagged import GLM45, QWEN3_CODER, TaggedParser, Tags

FUNCTIONS: dict[str, dict[str, Any] | None] = {
    "write": {
        "type": "object",
        "properties": {"path": {"type": "string"}, "text": {"$ref": "#/$defs/Text"}, "data": {}},
        "$defs": {"Text": {"type": "string"}},
    },
    "stop": None,
}
Call = tuple[str, dict[str, Any]]


def written(value: Any) -> str:
    """As the chat templates of both write a value: texts as they are, the rest as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def coder_text(calls: list[Call]) -> str:
    texts = []
    for name, arguments in calls:
        parameters = "".join(
            f"<parameter={key}>\n{written(value)}\n</parameter>\n" for key, value in arguments.items()
        )
        texts.append(f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>")
    return "\n".join(texts)


def glm_text(calls: list[Call]) -> str:
    texts = []
    for name, arguments in calls:
        pairs = "".join(
            f"<arg_key>{key}</arg_key>\n<arg_value>{written(value)}</arg_value>\n"
            for key, value in arguments.items()
        )
        texts.append(f"<tool_call>{name}\n{pairs}</tool_call>")
    return "\n".join(texts)


FORMATS: dict[str, tuple[Tags, Callable[[list[Call]], str]]] = {
    "qwen3_coder": (QWEN3_CODER, coder_text),
    "glm45": (GLM45, glm_text),
}


def fits(text: str) -> bool:
    """Only the tag that ends a value cannot stand in it."""
    return not any(tags.value_close in text for tags, _ in FORMATS.values())


# Texts may look like numbers, lists or tags: the schema says that they are texts.
TEXTS = st.one_of(
    STRINGS, st.sampled_from(["3", "[1]", "null", "\n\n", " a ", '"x"', "<parameter=b>"])
).filter(fits)
DATA = VALUES.filter(lambda value: not isinstance(value, str) and fits(written(value)))
ARGUMENTS = st.fixed_dictionaries({}, optional={"path": TEXTS, "text": TEXTS, "data": DATA})
CALLS = st.lists(
    st.one_of(st.tuples(st.just("write"), ARGUMENTS), st.just(("stop", {}))), min_size=1, max_size=3
)


@pytest.mark.parametrize("name", FORMATS)
@given(calls=CALLS, cuts=st.lists(st.integers(0, 10_000), max_size=12))
@settings(max_examples=50, deadline=None)
def test_calls_are_found_whole_however_the_text_is_cut(name: str, calls: list[Call], cuts: list[int]) -> None:
    tags, write = FORMATS[name]
    found = parse_pieces(TaggedParser(tags, FUNCTIONS), f"I see.\n\n{write(calls)}", cuts)
    assert [(call.name, json.loads(call.arguments)) for call in found.calls] == calls
    assert found.content == "I see."


@pytest.mark.parametrize(
    ("tags", "head"),
    [
        (QWEN3_CODER, "<tool_call>\n<function=write>\n<parameter=path>\n"),
        (GLM45, "<tool_call>write\n<arg_key>path</arg_key>\n<arg_value>"),
    ],
)
def test_a_text_argument_streams_and_a_call_that_is_cut_off_keeps_what_there_is(
    tags: Tags, head: str
) -> None:
    parser = TaggedParser(tags, FUNCTIONS)
    answer = Answer()
    answer.take(parser.push(head + 'a "b'))
    assert [(call.name, call.arguments) for call in answer.calls] == [("write", '{"path": "a \\"b')]
    answer.take(parser.push("c</"))
    assert answer.calls[0].arguments == '{"path": "a \\"bc'
    answer.take(parser.finish())
    assert answer.calls[0].arguments == '{"path": "a \\"bc</'


def test_the_forms_that_models_fall_into() -> None:
    # Without the outer tags, without the one that ends the function, and with text after it.
    bare = "<function=write>\n<parameter=path>x</parameter>\n</function> ok"
    answer = parse_whole(TaggedParser(QWEN3_CODER, FUNCTIONS), bare)
    assert [(call.name, call.arguments) for call in answer.calls] == [("write", '{"path": "x"}')]
    assert answer.content.strip() == "ok"
    unclosed = "<tool_call><function=write><parameter=path>\nx\n</parameter></tool_call>"
    answer = parse_whole(TaggedParser(QWEN3_CODER, FUNCTIONS), unclosed)
    assert [(call.name, call.arguments) for call in answer.calls] == [("write", '{"path": "x"}')]
    forgot = "<tool_call>stop and so on"
    answer = parse_whole(TaggedParser(GLM45, FUNCTIONS), forgot)
    assert [(call.name, call.arguments) for call in answer.calls] == [("stop", "{}")]
    assert answer.content == "and so on"


@pytest.mark.parametrize(
    ("tags", "text"),
    [
        (QWEN3_CODER, "<tool_call>\n<function=unknown>\n</function>\n</tool_call>"),
        (QWEN3_CODER, "<tool_call>{}</tool_call>"),
        (GLM45, "<tool_call>unknown\n</tool_call>"),
        (GLM45, "<tool_call></tool_call>"),
        (GLM45, "<tool_call>wri"),
    ],
)
def test_a_tag_that_calls_no_function_is_content(tags: Tags, text: str) -> None:
    assert parse_whole(TaggedParser(tags, FUNCTIONS), text) == Answer(content=text)


@pytest.mark.parametrize(
    ("text", "types", "value"),
    [
        ("3", {"integer"}, 3),
        ("3", {"number"}, 3),
        ("3", {"string", "null"}, "3"),
        ("null", {"string", "null"}, None),
        ("True", {"boolean"}, True),
        ("{'a': [None, 1]}", {"object"}, {"a": [None, 1]}),
        ("not a number", {"integer"}, "not a number"),
        ("NaN", set(), "NaN"),
        ("[1, 2", set(), "[1, 2"),
        ("02139", set(), "02139"),
        (" 1.50 ", set(), 1.5),
    ],
)
def test_a_value_becomes_json_by_what_it_may_be(text: str, types: set[str], value: Any) -> None:
    assert json.loads(json_value(text, frozenset(types))) == value


def test_the_types_of_a_schema() -> None:
    root = {
        "$defs": {"A": {"anyOf": [{"type": "string"}, {"type": "null"}]}, "Loop": {"$ref": "#/$defs/Loop"}}
    }
    assert types_of({"$ref": "#/$defs/A"}, root) == {"string", "null"}
    assert types_of({"$ref": "#/$defs/Loop"}, root) == frozenset()
    assert types_of({"enum": ["a", 1]}, root) == {"string", "integer"}
    assert types_of({"const": True}, root) == {"boolean"}
    assert types_of({"oneOf": [{"type": "string"}, {}]}, root) == frozenset()
    assert types_of({"type": ["array", "null"]}, root) == {"array", "null"}
