"""What OpenAI's client gets for a text that the model writes: reasoning, content, calls, and why it ended."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionMessage
from tokenizers import Tokenizer as Backend
from tokenizers import decoders
from tokenizers.models import BPE

from mainspring.engine.outputs import FinishReason
from mainspring.engine.sampling_params import StructuredOutputsParams
from mainspring.formats.tokenizer import Tokenizer
from support.scripted_engine import Scripted, WritingEngine, scripted_app
from support.serving import MODEL_NAME

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {"name": "get_weather", "description": "Weather", "parameters": WEATHER},
    },
    {"type": "function", "function": {"name": "now"}},
]
HELLO: list[Any] = [{"role": "user", "content": "hello"}]
TWO_CALLS = (
    'Looking.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "</tool_call> \\"Ur\\""}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now"}\n</tool_call>'
)

Ask = Callable[..., Any]


@pytest.fixture
def with_text(tiny_model: Path) -> Callable[..., Any]:
    """Runs a scenario with a server whose model writes this text; returns what the scenario returns."""
    tokenizer = Tokenizer.from_directory(tiny_model)

    def run(
        text: str,
        scenario: Callable[[Scripted], Coroutine[Any, Any, Any]],
        finish_reason: FinishReason = "stop",
        **options: Any,
    ) -> Any:
        async def play() -> Any:
            engine = WritingEngine(tokenizer, text, finish_reason)
            async with scripted_app(tokenizer, engine, **options) as app:
                return await asyncio.wait_for(scenario(app), 30)

        return asyncio.run(play())

    return run


def chat(**fields: Any) -> Callable[[Scripted], Coroutine[Any, Any, ChatCompletion]]:
    """A scenario that asks once."""

    async def scenario(app: Scripted) -> ChatCompletion:
        return await app.client.chat.completions.create(model=MODEL_NAME, messages=HELLO, **fields)

    return scenario


def streamed_chat(**fields: Any) -> Callable[[Scripted], Coroutine[Any, Any, dict[str, Any]]]:
    """A scenario that asks for a stream and puts it together."""

    async def scenario(app: Scripted) -> dict[str, Any]:
        joined: dict[str, Any] = {"content": "", "reasoning": "", "calls": [], "reasons": [], "logprobs": []}
        stream = await app.client.chat.completions.create(
            model=MODEL_NAME, messages=HELLO, stream=True, **fields
        )
        async for chunk in stream:
            for choice in chunk.choices:
                joined["content"] += choice.delta.content or ""
                joined["reasoning"] += (choice.delta.model_extra or {}).get("reasoning_content", "")
                if choice.finish_reason:
                    joined["reasons"].append(choice.finish_reason)
                if choice.logprobs is not None:
                    joined["logprobs"] += choice.logprobs.content or []
                for call in choice.delta.tool_calls or []:
                    assert call.function is not None
                    if call.id is not None:
                        assert call.index == len(joined["calls"])
                        joined["calls"].append([call.function.name, ""])
                    joined["calls"][call.index][1] += call.function.arguments or ""
        return joined

    return scenario


def calls_of(message: ChatCompletionMessage) -> list[list[str]]:
    """The calls of a message as pairs of name and arguments."""
    return [[call.function.name, call.function.arguments] for call in message.tool_calls or []]


def test_calls_are_found_and_streamed_alike(with_text: Ask) -> None:
    whole = with_text(TWO_CALLS, chat(tools=TOOLS, logprobs=True))
    (choice,) = whole.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Looking."
    assert calls_of(choice.message) == [
        ["get_weather", '{"city": "</tool_call> \\"Ur\\""}'],
        ["now", "{}"],
    ]
    assert len({call.id for call in choice.message.tool_calls}) == 2
    pieces = with_text(TWO_CALLS, streamed_chat(tools=TOOLS, logprobs=True))
    assert pieces["content"] == choice.message.content
    assert pieces["calls"] == calls_of(choice.message)
    assert pieces["reasons"] == ["tool_calls"]
    assert [entry.token for entry in pieces["logprobs"]] == [entry.token for entry in choice.logprobs.content]


def test_without_tools_the_same_text_is_content(with_text: Ask) -> None:
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        (choice,) = with_text(TWO_CALLS, chat(**fields)).choices
        assert (choice.message.content, choice.message.tool_calls) == (TWO_CALLS, None)
        assert choice.finish_reason == "stop"


def test_a_call_that_is_cut_off_ends_by_length(with_text: Ask) -> None:
    (choice,) = with_text(TWO_CALLS[:-14], chat(tools=TOOLS), finish_reason="length").choices
    assert choice.finish_reason == "length"
    assert len(choice.message.tool_calls) == 2


def test_a_named_function_is_held_to_its_schema(with_text: Ask) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}

    async def scenario(app: Scripted) -> None:
        answer = await chat(tools=TOOLS, tool_choice=named)(app)
        assert calls_of(answer.choices[0].message) == [["get_weather", '{"city": "Ur"}']]
        assert answer.choices[0].finish_reason == "stop"
        (request,) = app.engine.requests
        assert request.params.structured_outputs == StructuredOutputsParams(json=WEATHER)

    with_text('{"city": "Ur"}', scenario)
    pieces = with_text('{"city": "Ur"}', streamed_chat(tools=TOOLS, tool_choice=named))
    assert pieces["calls"] == [["get_weather", '{"city": "Ur"}']]


def test_required_calls_are_held_to_a_list_of_them(with_text: Ask) -> None:
    text = '[{"name": "now", "arguments": {}}, {"name": "get_weather", "arguments": {"city": "Ur"}}]'
    wanted = [["now", "{}"], ["get_weather", '{"city": "Ur"}']]

    async def scenario(app: Scripted) -> None:
        for parallel in (True, False):
            answer = await chat(tools=TOOLS, tool_choice="required", parallel_tool_calls=parallel)(app)
            assert calls_of(answer.choices[0].message) == wanted
            assert answer.choices[0].finish_reason == "tool_calls"
            structured = app.engine.requests[-1].params.structured_outputs
            assert structured is not None
            assert isinstance(structured.json, dict)
            assert structured.json.get("maxItems") == (None if parallel else 1)

    with_text(text, scenario)
    pieces = with_text(text, streamed_chat(tools=TOOLS, tool_choice="required"))
    assert (pieces["calls"], pieces["reasons"], pieces["content"]) == (wanted, ["tool_calls"], "")


def test_llama_s_calls_stand_without_tags(with_text: Ask) -> None:
    text = '{"name": "now", "parameters": {}}; {"name": "get_weather", "parameters": {"city": "Ur"}}'
    answer = with_text(text, chat(tools=TOOLS), tool_parser="llama3_json")
    assert [name for name, _ in calls_of(answer.choices[0].message)] == ["now", "get_weather"]
    assert answer.choices[0].message.content is None


def test_other_formats_of_calls_refuse_a_form_beside_tools(with_text: Ask) -> None:
    async def scenario(app: Scripted) -> None:
        with pytest.raises(openai.BadRequestError) as refused:
            await chat(tools=TOOLS, response_format={"type": "json_object"})(app)
        assert refused.value.param == "tool_choice"

    with_text("a", scenario, tool_parser="llama3_json")


def test_a_strict_function_is_held_to_its_schema_where_the_model_may_also_talk(with_text: Ask) -> None:
    strict: list[Any] = [{**TOOLS[0], "function": {**TOOLS[0]["function"], "strict": True}}, TOOLS[1]]

    async def scenario(app: Scripted) -> None:
        await chat(tools=strict)(app)
        await chat(tools=TOOLS)(app)
        held, free = (request.params.structured_outputs for request in app.engine.requests)
        assert held is not None
        assert held.grammar is not None
        assert '"city"' in held.grammar
        assert free is None

    with_text("a", scenario)

    async def refusal(app: Scripted) -> None:
        with pytest.raises(openai.BadRequestError, match="'get_weather' is strict") as refused:
            await chat(tools=strict)(app)
        assert refused.value.param == "tools"

    with_text("a", refusal, tool_parser="pythonic")


def test_calls_in_tags_are_found_and_typed(with_text: Ask) -> None:
    text = (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\n42\n</parameter>\n</function>\n</tool_call>"
    )
    answer = with_text(text, chat(tools=TOOLS), tool_parser="qwen3_coder")
    assert calls_of(answer.choices[0].message) == [["get_weather", '{"city": "42"}']]
    assert answer.choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("special", [True, False])
def test_marks_that_are_special_tokens_are_seen(special: bool) -> None:
    marks = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<end>"]
    backend = Backend(BPE(vocab={chr(byte): byte for byte in range(128)}, merges=[]))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(marks if special else ["<end>"])
    template = "{{ tools }}{{ messages[0].content }}<think></tool_call>"
    tokenizer = Tokenizer(backend, {"eos_token": "<end>", "chat_template": template})
    text = 'hm</think><tool_call>{"name": "now"}</tool_call>'

    async def scenario() -> None:
        async with scripted_app(tokenizer, WritingEngine(tokenizer, text), tool_parser="hermes") as app:
            message = (await chat(tools=TOOLS)(app)).choices[0].message
            assert calls_of(message) == [["now", "{}"]]
            assert app.engine.requests[0].params.skip_special_tokens != special

    asyncio.run(scenario())


def test_reasoning_stands_apart(with_text: Ask) -> None:
    text = "<think>\nHm, a greeting.\n</think>\n\nHello!"
    answer = with_text(text, chat(), reasoning_parser="think")
    message = answer.choices[0].message
    assert (message.content, message.model_extra["reasoning_content"]) == ("Hello!", "Hm, a greeting.")
    pieces = with_text(text, streamed_chat(), reasoning_parser="think")
    assert (pieces["content"], pieces["reasoning"]) == ("Hello!", "Hm, a greeting.")


@pytest.mark.parametrize(
    ("form", "structured"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, StructuredOutputsParams(json_object=True)),
        (
            {"type": "json_schema", "json_schema": {"name": "weather", "schema": WEATHER, "strict": True}},
            StructuredOutputsParams(json=WEATHER),
        ),
    ],
)
def test_a_response_format_holds_the_engine_to_it(
    with_text: Ask, form: dict[str, Any], structured: StructuredOutputsParams | None
) -> None:
    async def scenario(app: Scripted) -> None:
        await chat(response_format=form)(app)
        assert app.engine.requests[0].params.structured_outputs == structured

    with_text("{}", scenario)


def test_every_sampling_parameter_reaches_the_engine(with_text: Ask) -> None:
    fields = {
        "presence_penalty": 0.5,
        "frequency_penalty": -1.0,
        "temperature": 0.25,
        "top_p": 0.5,
        "seed": 3,
    }
    extra = {
        "repetition_penalty": 1.5,
        "allowed_token_ids": [65, 66],
        "bad_words": ["no"],
        "top_k": 7,
        "min_p": 0.1,
        "min_tokens": 2,
        "stop_token_ids": [67],
        "ignore_eos": True,
        "structured_outputs": {"regex": "a+"},
    }

    async def scenario(app: Scripted) -> None:
        await chat(logit_bias={"65": 5}, stop=["x"], extra_body=extra, **fields)(app)
        params = app.engine.requests[0].params
        for name, value in {**fields, **extra, "stop": ["x"], "logit_bias": {65: 5.0}}.items():
            wanted = StructuredOutputsParams(regex="a+") if name == "structured_outputs" else value
            assert getattr(params, name) == wanted, name

    with_text("ab", scenario)


def test_choices_share_their_prompt_and_stand_where_they_were_put(with_text: Ask) -> None:
    async def scenario(app: Scripted) -> None:
        extra = {"priority": -3, "cache_salt": "tenant"}
        await app.client.completions.create(
            model=MODEL_NAME, prompt=["one", "two"], n=3, seed=7, extra_body=extra
        )
        requests = app.engine.requests
        first, fourth = requests[0].request_id, requests[3].request_id
        assert [request.fork_of for request in requests] == [None, first, first, None, fourth, fourth]
        assert [request.params.seed for request in requests] == [7, 8, 9, 7, 8, 9]
        assert {(request.priority, request.cache_salt) for request in requests} == {(-3, "tenant")}
        with pytest.raises(openai.BadRequestError) as refused:
            await app.client.completions.create(model=MODEL_NAME, prompt="a", extra_body={"priority": 2**31})
        assert refused.value.param == "priority"

    with_text("ab", scenario)


def test_a_template_that_takes_too_long_is_stopped(tiny_model: Path) -> None:
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer = Tokenizer.from_directory(tiny_model, chat_template=endless, template_seconds=0.2)

    async def scenario() -> None:
        async with scripted_app(tokenizer, WritingEngine(tokenizer, "a")) as app:
            with pytest.raises(openai.BadRequestError) as refused:
                await chat()(app)
            assert refused.value.code == "chat_template_error"
            answer = await app.client.completions.create(model=MODEL_NAME, prompt="a")
            assert answer.choices[0].text == "a"

    asyncio.run(scenario())


def test_the_conversation_with_calls_reaches_the_template(with_text: Ask) -> None:
    messages: list[Any] = [
        *HELLO,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call-1",
                    "type": "function",
                    "function": {"name": "now", "arguments": '{"zone": "Z"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call-1", "content": "noon"},
    ]

    async def scenario(app: Scripted) -> None:
        answer = await app.http.post("/tokenize", json={"messages": messages, "tools": TOOLS})
        text = app.llm.tokenizer.decode(answer.json()["tokens"], skip_special_tokens=False)
        assert '"get_weather"' in text
        assert '<tool_call>{"name": "now", "arguments": {"zone": "Z"}}</tool_call>' in text
        assert "<|im_start|>tool\nnoon<|im_end|>" in text

    with_text("", scenario)


def test_every_message_that_we_give_is_one_that_we_take(with_text: Ask) -> None:
    async def scenario(app: Scripted) -> None:
        answer = await chat(tools=TOOLS)(app)
        for message in (
            answer.choices[0].message.model_dump(),
            answer.choices[0].message.model_dump(exclude_none=True),
        ):
            again = await app.client.chat.completions.create(
                model=MODEL_NAME,
                messages=[*HELLO, message, *HELLO],
            )
            assert again.choices[0].message.content == TWO_CALLS

    with_text(TWO_CALLS, scenario)


def test_what_lies_between_is_asked_for_with_the_model_s_marks() -> None:
    letters = "abcdefgh"
    backend = Backend(BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    backend.add_special_tokens(["<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<end>"])
    backend.decoder = decoders.Fuse()
    tokenizer = Tokenizer(backend, {"eos_token": "<end>"})

    async def scenario() -> None:
        async with scripted_app(tokenizer, WritingEngine(tokenizer, "dd")) as app:
            answer = await app.client.completions.create(
                model=MODEL_NAME, prompt="ab", suffix="gh", echo=True, extra_body={"stop_token_ids": [3]}
            )
            assert answer.choices[0].text == "abdd"
            (request,) = app.engine.requests
            assert request.prompt_token_ids == [8, 0, 1, 9, 6, 7, 10]
            assert request.params.stop_token_ids == [3, 8, 9, 10]

    asyncio.run(scenario())


def responses(**fields: Any) -> Callable[[Scripted], Coroutine[Any, Any, Any]]:
    """A scenario that asks for a response."""

    async def scenario(app: Scripted) -> Any:
        return await app.client.responses.create(model=MODEL_NAME, **fields)

    return scenario


FLAT_TOOLS: list[Any] = [
    {"type": "function", "strict": False, "parameters": None, **tool["function"]} for tool in TOOLS
]


def test_a_response_has_an_item_for_thoughts_text_and_each_call(with_text: Ask) -> None:
    text = f"<think>Hm.</think>{TWO_CALLS}"
    answer = with_text(text, responses(input="hello", tools=FLAT_TOOLS), reasoning_parser="think")
    reasoning, message, first, second = answer.output
    assert reasoning.content[0].text == "Hm."
    assert answer.output_text == message.content[0].text == "Looking."
    assert (first.name, json.loads(first.arguments)) == ("get_weather", {"city": '</tool_call> "Ur"'})
    assert (second.name, second.arguments) == ("now", "{}")
    assert answer.status == "completed"
    assert {item.status for item in answer.output} == {"completed"}
    assert answer.usage.output_tokens == len(text) + 1
    assert len("Hm.") <= answer.usage.output_tokens_details.reasoning_tokens <= len("<think>Hm.</think>")


def test_the_events_of_a_response_add_up_to_it(with_text: Ask) -> None:
    text = f"<think>Hm.</think>{TWO_CALLS}"

    async def scenario(app: Scripted) -> None:
        # The client's own helper checks the order of events and puts them together.
        async with app.client.responses.stream(model=MODEL_NAME, input="hello", tools=FLAT_TOOLS) as stream:
            events = [event async for event in stream]
            final = await stream.get_final_response()
        assert [event.sequence_number for event in events] == list(range(len(events)))
        kinds = [event.type for event in events]
        assert kinds[:2] == ["response.created", "response.in_progress"]
        assert kinds[-1] == "response.completed"
        deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
        assert "".join(deltas) == final.output_text == "Looking."
        arguments = {
            event.item_id: event.arguments
            for event in events
            if event.type == "response.function_call_arguments.done"
        }
        assert list(arguments.values()) == [
            item.arguments for item in final.output if item.type == "function_call"
        ]
        assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 4

    with_text(text, scenario, reasoning_parser="think")


def test_a_response_that_is_cut_off_says_so(with_text: Ask) -> None:
    answer = with_text("Once upon", responses(input="hello", max_output_tokens=9), finish_reason="length")
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.output[0].status == "incomplete"


def test_a_response_with_logprobs(with_text: Ask) -> None:
    fields: dict[str, Any] = {
        "input": "hello",
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 1,
    }
    answer = with_text("abc", responses(**fields))
    entries = answer.output[0].content[0].logprobs
    assert [entry.token for entry in entries[:3]] == ["a", "b", "c"]
    assert all(entry.logprob == -1.0 for entry in entries)


def test_items_of_a_conversation_become_messages(with_text: Ask) -> None:
    items: list[Any] = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "input_text", "text": "Time?"}]},
        {"type": "reasoning", "id": "rs-1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "role": "assistant", "id": "msg-1", "status": "completed",
         "content": [{"type": "output_text", "text": "Let me see.", "annotations": []}]},
        {"type": "function_call", "call_id": "call-1", "name": "now", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "call-1", "output": "noon"},
    ]  # fmt: skip

    async def scenario(app: Scripted) -> None:
        await app.client.responses.create(
            model=MODEL_NAME, input=items, instructions="Answer.", tools=FLAT_TOOLS, temperature=0.5
        )
        (request,) = app.engine.requests
        text = app.llm.tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False)
        turns = text[text.index("<|im_start|>system\nAnswer.") :]
        assert turns == (
            "<|im_start|>system\nAnswer.<|im_end|>\n<|im_start|>system\nBe kind.<|im_end|>\n"
            "<|im_start|>user\nTime?<|im_end|>\n"
            '<|im_start|>assistant\nLet me see.<tool_call>{"name": "now", "arguments": {}}</tool_call><|im_end|>\n'
            "<|im_start|>tool\nnoon<|im_end|>\n<|im_start|>assistant\n"
        )
        assert request.params.temperature == 0.5

    with_text("ok", scenario)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0"),
        ({"input": [{"role": "user"}]}, "input.0.content"),
        ({"input": "a", "previous_response_id": "resp-1"}, "previous_response_id"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"input": "a", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "a", "top_logprobs": 3}, "top_logprobs"),
        ({"input": "a", "text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"input": "a", "temperature": -1}, "temperature"),
    ],
)
def test_wrong_responses_are_named(with_text: Ask, fields: dict[str, Any], param: str) -> None:
    async def scenario(app: Scripted) -> None:
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as refused:
                await app.client.responses.create(model=MODEL_NAME, stream=stream, **fields)
            assert refused.value.param == param, refused.value.message

    with_text("a", scenario)
