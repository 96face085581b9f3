"""Bad requests get a clear error in OpenAI's shape, and the server still serves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from support.serving import CONTEXT, MODEL_NAME, VOCAB_SIZE, Server

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
CALL = {"id": "call-1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
BROKEN_CALL = {**CALL, "function": {"name": "f", "arguments": "{"}}
NAMED = {"type": "function", "function": {"name": "g"}}


def deep(levels: int) -> dict[str, Any]:
    """A schema within a schema within a schema ..."""
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"not": schema}
    return schema


DEEP = deep(700)


def tool(name: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
    """A tool as a request gives it."""
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


@pytest.fixture(autouse=True)
def _still_serves(http: httpx.Client) -> Iterator[None]:
    yield
    good = http.post(COMPLETIONS, json={"model": MODEL_NAME, "prompt": "hello", "max_tokens": 2})
    assert good.status_code == 200
    assert good.json()["usage"]["completion_tokens"] == 2


def refused(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error of an answer that has to be one."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"]
    return error


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temperature": -0.5}, "temperature", ["-0.5", "between 0 and"]),
        ({"temperature": "warm"}, "temperature", ["number"]),
        ({"temperature": 1e300}, "temperature", ["between 0 and 1e+06"]),
        ({"temperature": True}, "temperature", ["number"]),
        ({"top_p": 0}, "top_p", ["top_p is 0"]),
        ({"top_p": 1.5}, "top_p", ["1.5", "between 0 and 1"]),
        ({"min_p": -1}, "min_p", ["-1"]),
        ({"top_k": -2}, "top_k", ["-2"]),
        ({"top_k": 2**80}, "top_k", [str(2**80)]),
        ({"max_tokens": 2**80}, "max_tokens", [str(2**80)]),
        ({"max_tokens": 0}, "max_tokens", ["0", "at least 1"]),
        ({"max_tokens": 2.5}, "max_tokens", ["integer"]),
        ({"seed": 2**70}, "seed", [str(2**70)]),
        ({"n": 0}, "n", ["greater than or equal to 1"]),
        ({"n": 129}, "n", ["128"]),
        ({"stop": ""}, "stop", ["empty"]),
        ({"stop": ["a", 1]}, "stop", ["string"]),
        ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids", [str(VOCAB_SIZE), str(VOCAB_SIZE - 1)]),
        ({"presence_penalty": 2.5}, "presence_penalty", ["2.5", "between -2 and 2"]),
        ({"frequency_penalty": "much"}, "frequency_penalty", ["number"]),
        ({"repetition_penalty": 0}, "repetition_penalty", ["between 0.01 and 100"]),
        ({"logit_bias": {"hello": 1}}, "logit_bias", ["token ids", "hello"]),
        ({"logit_bias": {"5": 101}}, "logit_bias", ["101", "100"]),
        ({"allowed_token_ids": []}, "allowed_token_ids", ["at least one"]),
        ({"bad_words": [""]}, "bad_words", ["non-empty"]),
        ({"structured_outputs": {}}, "structured_outputs", ["exactly one"]),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs", ["exactly one"]),
        ({"stream": "yes"}, "stream", ["boolean"]),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", ["boolean"]),
        ({"temprature": 0.5}, "temprature", ["Unrecognized", "'temperature'"]),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_wrong_values_are_named(
    http: httpx.Client, path: str, fields: dict[str, Any], param: str, words: list[str]
) -> None:
    prompt: dict[str, Any] = {"messages": HELLO} if path == CHAT else {"prompt": "hello"}
    error = refused(http.post(path, json={**prompt, **fields}), 400)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    for word in words:
        assert word in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "hello"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "tool"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [CALL]}]}, "messages.0"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
            "messages.0.tool_calls.0.function.name",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [BROKEN_CALL]}]}, "messages"),
        ({"messages": HELLO, "tools": [{"type": "function"}]}, "tools.0.function"),
        ({"messages": HELLO, "tools": [tool("a b")]}, "tools.0.function.name"),
        ({"messages": HELLO, "tools": [tool("f"), tool("f")]}, "tools"),
        ({"messages": HELLO, "tool_choice": "required"}, "tool_choice"),
        ({"messages": HELLO, "tools": [tool("f")], "tool_choice": NAMED}, "tool_choice"),
        ({"messages": HELLO, "tools": [tool("f")], "tool_choice": "perhaps"}, "tool_choice"),
        (
            {
                "messages": HELLO,
                "tools": [tool("f")],
                "response_format": {"type": "json_object"},
                "tool_choice": "required",
            },
            "tool_choice",
        ),
        ({"messages": HELLO, "tools": [tool("f", DEEP)], "tool_choice": "required"}, "tools"),
        ({"messages": HELLO, "response_format": {"type": "poem"}}, "response_format.type"),
        ({"messages": HELLO, "response_format": {"type": "json_schema"}}, "response_format"),
        ({"messages": HELLO, "reasoning_effort": "high"}, "reasoning_effort"),
        ({"messages": HELLO, "top_logprobs": 3}, "top_logprobs"),
        ({"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": HELLO, "max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
    ],
)
def test_wrong_chats_are_named(http: httpx.Client, fields: dict[str, Any], param: str) -> None:
    assert refused(http.post(CHAT, json=fields), 400)["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["fine", ""]}, "prompt"),
        ({"prompt": ["text", [1]]}, "prompt"),
        ({"prompt": [1, True]}, "prompt"),
        ({"prompt": [VOCAB_SIZE]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [2**80]}, "prompt"),
        ({"prompt": {"text": "hello"}}, "prompt"),
        ({"prompt": ["hello"] * 600, "n": 2}, "n"),
        ({"prompt": "hello", "logprobs": 21}, "logprobs"),
        ({"prompt": "hello", "logprobs": True}, "logprobs"),
        ({"prompt": "hello", "suffix": "there"}, "suffix"),
        ({"prompt": "hello", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "hello", "best_of": 3}, "best_of"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_completions_are_named(
    http: httpx.Client, fields: dict[str, Any], param: str, stream: bool
) -> None:
    assert refused(http.post(COMPLETIONS, json={**fields, "stream": stream}), 400)["param"] == param


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_prompt_longer_than_the_context_is_refused(http: httpx.Client, path: str, stream: bool) -> None:
    text = "x" * (CONTEXT + 5)
    prompt: dict[str, Any] = {"prompt": text}
    if path == CHAT:
        prompt = {"messages": [{"role": "user", "content": text}]}
    error = refused(http.post(path, json={**prompt, "stream": stream}), 400)
    assert error["code"] == "context_length_exceeded"
    assert str(CONTEXT) in error["message"]


@pytest.mark.parametrize(
    ("content", "media_type"),
    [
        (b"{", "application/json"),
        (b'{"prompt": "a",}', "application/json"),
        (b"\xff\xfe", "application/json"),
        (b"", "application/json"),
        (b"[1, 2]", "application/json"),
        (b'"hello"', "application/json"),
        (b"null", "application/json"),
        (b"[" * 50_000, "application/json"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "application/json"),
        # A form on a page elsewhere could send these; what is no JSON by its header is not read as such.
        (b'{"prompt": "a"}', "text/plain"),
        (b"prompt=a", "application/x-www-form-urlencoded"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(
    http: httpx.Client, content: bytes, media_type: str
) -> None:
    answer = http.post(COMPLETIONS, content=content, headers={"Content-Type": media_type})
    error = refused(answer, 400)
    assert error["code"] == "invalid_json"


@pytest.mark.parametrize("value", [b"NaN", b"Infinity", b"1e999"])
def test_numbers_that_are_none_are_refused(http: httpx.Client, value: bytes) -> None:
    content = b'{"prompt": "a", "temperature": ' + value + b"}"
    answer = http.post(COMPLETIONS, content=content, headers={"Content-Type": "application/json"})
    assert refused(answer, 400)["param"] == "temperature"


def test_half_a_character_is_refused(http: httpx.Client) -> None:
    content = b'{"prompt": "\\ud800"}'
    answer = http.post(COMPLETIONS, content=content, headers={"Content-Type": "application/json"})
    assert refused(answer, 400)["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_an_unknown_model_is_not_found(http: httpx.Client, path: str) -> None:
    body = {"model": "gpt-4", "messages": HELLO} if path == CHAT else {"model": "gpt-4", "prompt": "a"}
    error = refused(http.post(path, json=body), 404)
    assert error["code"] == "model_not_found"
    assert "gpt-4" in error["message"]
    assert MODEL_NAME in error["message"]
    assert refused(http.get("/v1/models/gpt-4"), 404)["code"] == "model_not_found"


def test_unknown_routes_and_methods_are_refused(http: httpx.Client) -> None:
    assert "/v1/nothing" in refused(http.get("/v1/nothing"), 404)["message"]
    assert "/v2" in refused(http.post("/v2", json={}), 404)["message"]
    answer = http.get(COMPLETIONS)
    refused(answer, 405)
    assert answer.headers["allow"] == "POST"


def test_a_body_over_the_limit_is_refused_before_it_is_read(http: httpx.Client) -> None:
    answer = http.post(COMPLETIONS, json={"prompt": "x" * (3 * 2**20)})
    error = refused(answer, 413)
    assert error["code"] == "body_too_large"
    assert str(2**20) in error["message"]


def test_a_body_of_unknown_length_is_cut_off_at_the_limit(http: httpx.Client) -> None:
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        yield b'{"prompt": "'
        while sent < 64 * 2**20:
            sent += 2**16
            yield b"x" * 2**16
        yield b'"}'

    answer = http.post(COMPLETIONS, content=chunks(), headers={"Content-Type": "application/json"})
    assert refused(answer, 413)["code"] == "body_too_large"
    # The rest was never asked for: only what fits in the sockets' buffers is sent beyond the limit.
    assert sent < 64 * 2**20


def test_a_foreign_host_name_is_refused(http: httpx.Client, server: Server) -> None:
    error = refused(http.get("/v1/models", headers={"Host": "evil.example"}), 403)
    assert "evil.example" in error["message"]
    port = server.url.rpartition(":")[2]
    for name in (f"localhost:{port}", "localhost", f"127.0.0.1:{port}", f"[::1]:{port}"):
        assert http.get("/v1/models", headers={"Host": name}).status_code == 200
