"""OpenAI's client against a real server: what goes beyond plain completions and chats."""

from __future__ import annotations

import base64
import json
import math
import struct
from typing import Any

import httpx
import jsonschema_rs
import openai
import pytest
import torch

from mainspring.formats.tokenizer import IncrementalDecoder, Tokenizer
from mainspring.model.checkpoint import load_model
from mainspring.ops.batch import TokenBatch
from support.serving import CONTEXT, MODEL_NAME, VOCAB_SIZE, Server

GREEDY: dict[str, Any] = {"model": MODEL_NAME, "temperature": 0}
HELLO: list[Any] = [{"role": "user", "content": "hello"}]
PLACE: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Ur", "Uruk"]}, "far": {"type": "boolean"}},
    "required": ["city", "far"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "go", "parameters": PLACE}},
    {"type": "function", "function": {"name": "stop"}},
]


def joined(chunks: Any) -> dict[int, dict[str, Any]]:
    """The choices of a streamed completion, put together."""
    whole: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            entry = whole.setdefault(choice.index, {"text": "", "reasons": [], "logprobs": {}})
            entry["text"] += choice.text
            entry["reasons"] += [choice.finish_reason] if choice.finish_reason else []
            for name, values in (choice.logprobs.model_dump() if choice.logprobs else {}).items():
                entry["logprobs"].setdefault(name, []).extend(values)
    return whole


@pytest.mark.parametrize("max_tokens", [0, 6])
@pytest.mark.parametrize("as_ids", [False, True])
def test_an_echo_puts_the_prompt_and_its_logprobs_first(
    client: openai.OpenAI, tiny_tokens: Any, max_tokens: int, as_ids: bool
) -> None:
    request: dict[str, Any] = {
        "prompt": [tiny_tokens("hello"), tiny_tokens("a")] if as_ids else ["hello", "a"],
        "max_tokens": max_tokens,
        "logprobs": 2,
        "echo": True,
        "n": 2,
        **GREEDY,
    }
    answer = client.completions.create(**request)
    plain = client.completions.create(**{**request, "echo": False, "max_tokens": 6})
    assert len(answer.choices) == 4
    for choice, without in zip(answer.choices, plain.choices, strict=True):
        prompt = ["hello", "a"][choice.index // 2]
        assert choice.text == prompt + without.text[:max_tokens]
        logprobs = choice.logprobs
        assert logprobs is not None
        assert without.logprobs is not None
        length = len(prompt) + max_tokens
        assert logprobs.text_offset == list(range(length))
        assert "".join(logprobs.tokens or []) == choice.text
        assert (logprobs.token_logprobs or [0])[0] is None
        assert (logprobs.top_logprobs or [{}])[0] is None
        assert len(logprobs.token_logprobs or []) == len(logprobs.top_logprobs or []) == length
        assert (logprobs.token_logprobs or [])[len(prompt) :] == (without.logprobs.token_logprobs or [])[
            :max_tokens
        ]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4 * max_tokens
    streamed = joined(client.completions.create(stream=True, **request))
    for choice in answer.choices:
        assert streamed[choice.index]["text"] == choice.text
        assert streamed[choice.index]["reasons"] == [choice.finish_reason]
        assert choice.logprobs is not None
        assert streamed[choice.index]["logprobs"] == choice.logprobs.model_dump()


def test_an_echo_s_logprobs_are_those_of_the_model(
    client: openai.OpenAI, tiny_model: Any, tiny_tokens: Any
) -> None:
    text = "the spring of a watch"
    answer = client.completions.create(prompt=text, max_tokens=0, logprobs=0, echo=True, **GREEDY)
    assert answer.choices[0].logprobs is not None
    expected = load_model(tiny_model).log_probs([tiny_tokens(text)])[0].tolist()
    assert (answer.choices[0].logprobs.token_logprobs or [])[1:] == expected


def test_a_prompt_s_logprobs_come_by_token_id(
    client: openai.OpenAI, tiny_model: Any, tiny_tokens: Any
) -> None:
    text = "the spring of a watch"
    ids = tiny_tokens(text)
    extra = {"prompt_logprobs": 1}
    answer = client.completions.create(prompt=text, max_tokens=1, extra_body=extra, **GREEDY)
    first, *rest = answer.choices[0].model_dump()["prompt_logprobs"]
    assert first is None
    expected = load_model(tiny_model).log_probs([ids])[0].tolist()
    assert [entry[str(token)]["logprob"] for token, entry in zip(ids[1:], rest, strict=True)] == expected
    assert all(1 in {candidate["rank"] for candidate in entry.values()} for entry in rest)
    decoded = [entry[str(token)]["decoded_token"] for token, entry in zip(ids[1:], rest, strict=True)]
    assert "".join(decoded) == text[1:]
    messages: Any = [{"role": "user", "content": text}]
    chat = client.chat.completions.create(
        messages=messages, max_tokens=1, extra_body={**extra, "return_token_ids": True}, **GREEDY
    ).model_dump()
    assert len(chat["prompt_logprobs"]) == len(chat["prompt_token_ids"])
    for fields in ({"stream": True}, {"echo": True, "logprobs": 2}):
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(prompt=text, extra_body=extra, **fields, **GREEDY)
        assert refused.value.param == "prompt_logprobs"


def test_token_ids_are_returned_when_asked_for(client: openai.OpenAI, tiny_tokens: Any) -> None:
    extra = {"return_token_ids": True}
    answer = client.completions.create(prompt="hello", max_tokens=5, extra_body=extra, **GREEDY).choices[0]
    assert answer.model_extra is not None
    assert answer.model_extra["prompt_token_ids"] == tiny_tokens("hello")
    assert answer.model_extra["token_ids"] == tiny_tokens(answer.text)
    chat = client.chat.completions.create(messages=HELLO, max_tokens=5, extra_body=extra, **GREEDY)
    assert (chat.choices[0].model_extra or {})["token_ids"] == tiny_tokens(chat.choices[0].message.content)


def test_a_count_may_come_with_every_chunk(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(
        client.chat.completions.create(
            messages=HELLO, max_tokens=5, stream=True, stream_options=options, **GREEDY
        )
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage is not None]
    assert len(counts) == len(chunks)
    assert counts == sorted(counts)
    assert counts[-1] == 5


def test_a_schema_holds_the_answer_to_it(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": PLACE}}
    answer = client.chat.completions.create(
        model=MODEL_NAME, messages=HELLO, response_format=form, n=4, seed=1, max_tokens=300
    )
    texts = [choice.message.content for choice in answer.choices]
    assert all(jsonschema_rs.is_valid(PLACE, json.loads(text or "")) for text in texts)
    assert [choice.finish_reason for choice in answer.choices] == ["stop"] * 4
    assert len(set(texts)) > 1


def test_a_regular_expression_and_choices_hold_the_text(client: openai.OpenAI) -> None:
    for structured, allowed in (
        ({"regex": "a{3}b"}, {"aaab"}),
        ({"choice": ["yes", "no"]}, {"yes", "no"}),
        ({"grammar": 'root ::= "x" | "y" "z"'}, {"x", "yz"}),
    ):
        extra = {"structured_outputs": structured}
        answer = client.completions.create(model=MODEL_NAME, prompt="a", n=3, seed=2, extra_body=extra)
        assert {choice.text for choice in answer.choices} <= allowed, structured


@pytest.mark.parametrize(
    "structured",
    [
        {"regex": "(a"},
        {"grammar": "root ::= ("},
        {"json": {"type": "vehicle"}},
        {"json": "{"},
        {"json": {"$ref": "#/$defs/missing"}},
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_form_that_cannot_be_followed_is_refused(
    client: openai.OpenAI, structured: dict[str, Any], stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(
            prompt="a", stream=stream, extra_body={"structured_outputs": structured}, **GREEDY
        )
    assert refused.value.param == "structured_outputs"


@pytest.mark.parametrize("stream", [False, True])
def test_a_required_call_is_one_of_the_tools(client: openai.OpenAI, stream: bool) -> None:
    request: dict[str, Any] = {
        "model": MODEL_NAME,
        "messages": HELLO,
        "tools": TOOLS,
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "seed": 11,
        "max_tokens": 300,
    }
    calls: dict[int, list[str]] = {}
    if stream:
        for chunk in client.chat.completions.create(stream=True, **request):
            for call in chunk.choices[0].delta.tool_calls or []:
                assert call.function is not None
                entry = calls.setdefault(call.index, ["", ""])
                entry[0] += call.function.name or ""
                entry[1] += call.function.arguments or ""
    else:
        choice = client.chat.completions.create(**request).choices[0]
        assert choice.finish_reason == "tool_calls"
        for index, found in enumerate(choice.message.tool_calls or []):
            calls[index] = [found.function.name, found.function.arguments]
    assert list(calls) == [0]
    name, arguments = calls[0]
    assert name in ("go", "stop")
    assert jsonschema_rs.is_valid(PLACE if name == "go" else {"type": "object"}, json.loads(arguments))


def test_a_named_call_has_arguments_of_its_schema(client: openai.OpenAI) -> None:
    choice = client.chat.completions.create(
        model=MODEL_NAME,
        messages=HELLO,
        tools=TOOLS,
        tool_choice={"type": "function", "function": {"name": "go"}},
        max_tokens=300,
    ).choices[0]
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "go"
    assert jsonschema_rs.is_valid(PLACE, json.loads(call.function.arguments))


def test_calls_in_the_model_s_own_format_are_found(client: openai.OpenAI) -> None:
    # The model writes noise by itself: an expression makes it write calls.
    written = '<tool_call>\\{"name": "stop", "arguments": \\{"a": "[a-c]{5}"\\}\\}</tool_call>'
    choice = client.chat.completions.create(
        model=MODEL_NAME,
        messages=HELLO,
        tools=TOOLS,
        max_tokens=300,
        extra_body={"structured_outputs": {"regex": written}},
    ).choices[0]
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert (call.function.name, choice.finish_reason) == ("stop", "tool_calls")
    assert len(json.loads(call.function.arguments)["a"]) == 5
    assert choice.message.content is None


def test_beside_tools_a_schema_holds_what_is_no_call(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": PLACE}}
    answer = client.chat.completions.create(
        model=MODEL_NAME, messages=HELLO, tools=TOOLS, response_format=form, n=24, seed=1, max_tokens=600,
        # The random model hardly ever writes "<" by itself.
        logit_bias={str(ord("<") - ord("!")): 4}, parallel_tool_calls=False,
    )  # fmt: skip
    kinds = set()
    for choice in answer.choices:
        if choice.finish_reason == "length":
            continue
        kinds.add(choice.finish_reason)
        if choice.message.tool_calls:
            (call,) = choice.message.tool_calls
            assert call.type == "function"
            assert call.function.name in ("go", "stop")
            if call.function.name == "go":
                assert jsonschema_rs.is_valid(PLACE, json.loads(call.function.arguments))
            assert choice.message.content is None
        else:
            assert jsonschema_rs.is_valid(PLACE, json.loads(choice.message.content or ""))
    assert kinds == {"stop", "tool_calls"}


@pytest.mark.parametrize(
    "extreme",
    [
        {"temperature": 5e-324},
        {"temperature": 1e6},
        {"top_p": 5e-324},
        {"min_p": 5e-324},
        {"min_p": 1.0},
        {"top_k": 2**31 - 1},
        {"repetition_penalty": 0.01},
        {"repetition_penalty": 100.0},
        {"logit_bias": {"0": -100, "257": 100}},
        {"seed": -(2**63)},
        {"seed": 2**63 - 1},
        {"temperature": 5e-324, "repetition_penalty": 0.01, "presence_penalty": -2, "top_p": 5e-324},
    ],
)
def test_extreme_values_are_served(http: httpx.Client, extreme: dict[str, Any]) -> None:
    body = {"prompt": "hello", "max_tokens": 8, "logprobs": 2, "ignore_eos": True, "n": 2, **extreme}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    for choice in answer.json()["choices"]:
        assert len(choice["logprobs"]["token_logprobs"]) == 8
        assert all(-1e4 < value <= 0 for value in choice["logprobs"]["token_logprobs"])


def test_embeddings_are_the_model_s_pooled_states(
    client: openai.OpenAI, tiny_model: Any, tiny_tokens: Any
) -> None:
    texts = ["hello", "a longer text than that one", "hello"]
    answer = client.embeddings.create(model=MODEL_NAME, input=texts, encoding_format="float")
    assert [entry.index for entry in answer.data] == [0, 1, 2]
    assert answer.data[0].embedding == answer.data[2].embedding
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(len(text) for text in texts)
    model = load_model(tiny_model)
    for pooling in ("mean", "last"):
        raw = client.embeddings.create(
            model=MODEL_NAME,
            input=texts[:2],
            encoding_format="float",
            extra_body={"pooling": pooling, "normalize": False},
        )
        for text, entry in zip(texts[:2], raw.data, strict=True):
            ids = tiny_tokens(text)
            with torch.inference_mode():
                states = model(torch.tensor(ids), TokenBatch.packed([len(ids)]))
            expected = states.mean(0) if pooling == "mean" else states[-1]
            torch.testing.assert_close(torch.tensor(entry.embedding), expected, rtol=1e-5, atol=1e-6)
    # The client asks for base64 unless told otherwise, and decodes it.
    again = client.embeddings.create(model=MODEL_NAME, input=[tiny_tokens(text) for text in texts])
    for ours, theirs in zip(again.data, answer.data, strict=True):
        assert ours.embedding == pytest.approx(theirs.embedding, rel=1e-6)
        assert math.fsum(value * value for value in theirs.embedding) == pytest.approx(1.0)
    short = client.embeddings.create(model=MODEL_NAME, input="hello", dimensions=8, encoding_format="float")
    assert len(short.data[0].embedding) == 8
    assert math.fsum(value * value for value in short.data[0].embedding) == pytest.approx(1.0)


def test_base64_is_of_little_endian_floats(http: httpx.Client) -> None:
    body = {"input": "hello", "encoding_format": "base64"}
    text = http.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
    floats = http.post("/v1/embeddings", json={"input": "hello"}).json()["data"][0]["embedding"]
    values = struct.unpack(f"<{len(floats)}f", base64.b64decode(text))
    assert values == pytest.approx(floats, rel=1e-6)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": [VOCAB_SIZE]}, "input"),
        ({"input": "x" * (CONTEXT + 1)}, "input"),
        ({"input": "a", "dimensions": 10_000}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "pooling": "max"}, "pooling"),
    ],
)
def test_wrong_embeddings_are_named(http: httpx.Client, fields: dict[str, Any], param: str) -> None:
    answer = http.post("/v1/embeddings", json=fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_a_prefix_is_shared_within_one_salt_only(client: openai.OpenAI, server: Server) -> None:
    def cached(salt: str, n: int = 1) -> int:
        answer = client.completions.create(
            prompt="a prefix that is long enough for several blocks of sixteen tokens",
            max_tokens=1,
            n=n,
            extra_body={"cache_salt": salt},
            **GREEDY,
        )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        return answer.usage.prompt_tokens_details.cached_tokens or 0

    assert [cached("one"), cached("one") > 0, cached("two")] == [0, True, 0]
    # Choices share their prompt, but it was computed for them.
    assert [cached("three", n=3), cached("three", n=3) > 0] == [0, True]


def test_tokens_go_there_and_back(http: httpx.Client, tiny_tokens: Any) -> None:
    answer = http.post("/tokenize", json={"prompt": "héllo", "return_token_strs": True}).json()
    assert answer["tokens"] == tiny_tokens("héllo")
    assert (answer["count"], answer["max_model_len"], len(answer["token_strs"])) == (6, CONTEXT, 6)
    assert http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "héllo"}
    chat = http.post("/tokenize", json={"messages": HELLO}).json()
    text = http.post("/detokenize", json={"tokens": chat["tokens"]}).json()["prompt"]
    assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    for path, body, param in (
        ("/tokenize", {}, None),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, None),
        ("/detokenize", {"tokens": [VOCAB_SIZE]}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
    ):
        refused = http.post(path, json=body)
        assert refused.status_code == 400, refused.text
        assert param is None or refused.json()["error"]["param"] == param


def test_a_response_of_the_real_server(client: openai.OpenAI) -> None:
    whole = client.responses.create(input="hello", max_output_tokens=20, **GREEDY)
    chat = client.chat.completions.create(messages=HELLO, max_tokens=20, **GREEDY)
    assert whole.output_text == chat.choices[0].message.content
    assert whole.usage is not None
    assert chat.usage is not None
    assert whole.usage.input_tokens == chat.usage.prompt_tokens
    events = list(client.responses.create(input="hello", max_output_tokens=20, stream=True, **GREEDY))
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == whole.output_text


def test_an_adapter_is_a_model_of_its_own(keyed: httpx.Client) -> None:
    cards = keyed.get("/v1/models").json()["data"]
    assert [(card["id"], card.get("parent")) for card in cards] == [(MODEL_NAME, None), ("tuned", MODEL_NAME)]
    body = {"prompt": "hello", "max_tokens": 12, "temperature": 0}
    texts = {}
    for name in (MODEL_NAME, "tuned"):
        answer = keyed.post("/v1/completions", json={**body, "model": name}).json()
        assert answer["model"] == name
        texts[name] = answer["choices"][0]["text"]
    assert texts[MODEL_NAME] != texts["tuned"]


def test_speculation_changes_no_text(http: httpx.Client, keyed: httpx.Client) -> None:
    body = {"prompt": "abc abc abc abc", "max_tokens": 120, "temperature": 0, "ignore_eos": True}
    assert (
        keyed.post("/v1/completions", json=body).json()["choices"]
        == http.post("/v1/completions", json=body).json()["choices"]
    )


def test_pieces_of_characters_are_put_together(client: openai.OpenAI, tiny_model: Any) -> None:
    """Every token is one byte: a character of several comes in one piece, once it is complete."""
    tokenizer = Tokenizer.from_directory(tiny_model)
    ids = tokenizer.encode("é€")
    extra = {"structured_outputs": {"choice": ["é€"]}}
    chunks = list(
        client.completions.create(
            prompt="a", max_tokens=len(ids) + 1, stream=True, extra_body=extra, **GREEDY
        )
    )
    pieces = [chunk.choices[0].text for chunk in chunks if chunk.choices and chunk.choices[0].text]
    assert pieces == ["é", "€"]
    decoder = IncrementalDecoder(tokenizer)
    assert [piece for token_id in ids if (piece := decoder.push(token_id))] == pieces
