"""`strict` under tool_choice "auto": text is free, and every call that it begins follows the function's schema."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import llguidance
import pytest

from mainspring.engine.server.tool_calls.formats import ToolFormat
from mainspring.engine.server.tool_calls.strict import StrictFunction, strict_grammar
from mainspring.errors import InvalidRequestError

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"$ref": "#/$defs/Days"},
        "unit": {"type": "string", "enum": ["C", "F"]},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"Days": {"type": "integer"}},
}
FUNCTIONS = (StrictFunction("get_weather", WEATHER, True), StrictFunction("note", None, False))
TOOL_TAGS = ("<tool_call>", "</tool_call>")


class Vocabulary:
    """One token a byte, an end, and the tags as special tokens."""

    def __init__(self) -> None:
        self.eos_token_id = 256
        self.bos_token_id = None
        self.tokens = [*(bytes([b]) for b in range(256)), b"<end>", *(tag.encode() for tag in TOOL_TAGS)]
        self.special_token_ids = [256, 257, 258]

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(Vocabulary()), eos_token=[256])


def allows(form: ToolFormat, text: str, *, special: bool = False, parallel: bool = True) -> bool:
    """Whether the grammar admits the whole text, token by token, and that it ends there."""
    source = strict_grammar(form, FUNCTIONS, parallel=parallel, special=TOOL_TAGS if special else ())
    matcher = llguidance.LLMatcher(tokenizer(), llguidance.grammar_from("grammar", source), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    ids: list[int] = []
    for part in re.split("(</?tool_call>)", text) if special else [text]:
        ids += [257 + TOOL_TAGS.index(part)] if part in TOOL_TAGS and special else list(part.encode())
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


def hermes(city: str = '"Rome"', days: str = "3", name: str = "get_weather") -> str:
    call = f'{{"name": "{name}", "arguments": {{"city": {city}, "days": {days}}}}}'
    return f"<tool_call>\n{call}\n</tool_call>"


def coder(city: str = "Rome", days: str = "3", name: str = "get_weather", more: str = "") -> str:
    return (
        f"<tool_call>\n<function={name}>\n<parameter=city>\n{city}\n</parameter>\n"
        f"<parameter=days>\n{days}\n</parameter>\n{more}</function>\n</tool_call>"
    )


def glm(city: str = "Rome", days: str = "3", name: str = "get_weather", more: str = "") -> str:
    return (
        f"<tool_call>{name}\n<arg_key>city</arg_key>\n<arg_value>{city}</arg_value>\n"
        f"<arg_key>days</arg_key>\n<arg_value>{days}</arg_value>\n{more}</tool_call>"
    )


@pytest.mark.parametrize("special", [False, True])
def test_hermes_calls_follow_the_schema_and_text_is_free(special: bool) -> None:
    note = '<tool_call>{"name": "note", "arguments": {"x": [1, {"y": null}]}}</tool_call>'
    for good in ("", "Hello <b>{", f"<think>so</think> I look.\n{hermes()}", f"{hermes()}\n{note} and done"):
        assert allows("hermes", good, special=special)
    for wrong in (
        hermes(days='"3"'),
        hermes(name="get"),
        hermes(days="3.5"),
        hermes().replace(', "days": 3', ""),
        hermes().replace("city", "town"),
        "<tool_call>Hello</tool_call>",
        "text <tool_call>",
    ):
        assert not allows("hermes", wrong, special=special), wrong
    assert allows("hermes", f"So: {hermes()}", special=special, parallel=False)
    assert not allows("hermes", f"{hermes()}\n{note}", special=special, parallel=False)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("form", ["qwen3_coder", "glm45"])
def test_tagged_calls_follow_the_schema_and_text_is_free(form: ToolFormat, special: bool) -> None:
    write = coder if form == "qwen3_coder" else glm
    unit = (
        "<parameter=unit>\n{}\n</parameter>\n"
        if form == "qwen3_coder"
        else "<arg_key>unit</arg_key>\n<arg_value>{}</arg_value>\n"
    )
    two = write("New\nYork <b>") + "\n" + write(more=unit.format("F"))
    for good in ("Hello", f"I look.\n{write()}", f"{two} ok"):
        assert allows(form, good, special=special), good
    for wrong in (
        write(days="three"),
        write(name="get"),
        write(more=unit.format("K")),
        write().replace("city", "town"),
        write(more=unit.format("C").replace("unit", "other")),
        "<tool_call>Hello</tool_call>",
    ):
        assert not allows(form, wrong, special=special), wrong
    anything = write(name="note").replace("days", "whatever")
    assert allows(form, anything, special=special)  # not strict: a name and any parameters
    assert not allows(form, f"{write()}\n{write()}", special=special, parallel=False)


def test_llama_calls_follow_the_schema_where_the_answer_begins_with_one() -> None:
    call = '{"name": "get_weather", "parameters": {"city": "Rome", "days": 3}}'
    for good in ("", "Hello {", call, f'<|python_tag|>{call}; {{"name": "note", "parameters": {{}}}}'):
        assert allows("llama3_json", good)
    for wrong in (call.replace("3", '"3"'), '{"a": 1}', call.replace("get_weather", "get"), f"[{call}]"):
        assert not allows("llama3_json", wrong)
    assert not allows("llama3_json", f"{call}; {call}", parallel=False)


def test_a_format_that_cannot_be_held_is_refused() -> None:
    with pytest.raises(
        InvalidRequestError, match="'get_weather' is strict, but calls in the format pythonic"
    ):
        strict_grammar("pythonic", FUNCTIONS, parallel=True, special=())
