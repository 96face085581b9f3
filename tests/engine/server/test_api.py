"""What OpenAI's own client gets from the server."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from support.serving import CONTEXT, MODEL_NAME, Server

GREEDY: dict[str, Any] = {"model": MODEL_NAME, "temperature": 0}
HELLO: list[Any] = [{"role": "user", "content": "hello"}]


def test_models_lists_the_one_that_is_served(client: openai.OpenAI) -> None:
    listed = client.models.list().data
    assert [model.id for model in listed] == [MODEL_NAME]
    assert client.models.retrieve(MODEL_NAME).id == MODEL_NAME
    assert listed[0].model_extra == {"max_model_len": CONTEXT}


def test_completion_counts_its_tokens(client: openai.OpenAI) -> None:
    answer = client.completions.create(prompt="hello", max_tokens=9, **GREEDY)
    (choice,) = answer.choices
    assert (choice.finish_reason, len(choice.text)) == ("length", 9)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        5,
        9,
        14,
    )


def test_completion_gives_16_tokens_unless_told_otherwise(client: openai.OpenAI) -> None:
    answer = client.completions.create(prompt="hello", **GREEDY)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


def test_chat_applies_the_template(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(messages=HELLO, max_completion_tokens=12, **GREEDY)
    prompt = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    plain = client.completions.create(prompt=prompt, max_tokens=12, **GREEDY)
    assert chat.choices[0].message.role == "assistant"
    assert chat.choices[0].message.content == plain.choices[0].text
    assert chat.usage is not None
    assert plain.usage is not None
    assert chat.usage.prompt_tokens == plain.usage.prompt_tokens


def test_developer_is_system_and_parts_are_joined(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    ours: list[Any] = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts}]
    plain: list[Any] = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hel\nlo"}]
    answers = [
        client.chat.completions.create(messages=messages, max_tokens=8, **GREEDY)
        for messages in (ours, plain)
    ]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content


@pytest.mark.parametrize("usage", [False, True])
def test_streamed_chat_is_the_whole_one_in_pieces(client: openai.OpenAI, usage: bool) -> None:
    request: dict[str, Any] = {"messages": HELLO, "max_tokens": 30, **GREEDY}
    whole = client.chat.completions.create(**request)
    options: dict[str, Any] = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = list(client.chat.completions.create(stream=True, **request, **options))
    deltas = [choice for chunk in chunks for choice in chunk.choices]
    assert "".join(choice.delta.content or "" for choice in deltas) == whole.choices[0].message.content
    assert [choice.finish_reason for choice in deltas if choice.finish_reason] == ["length"]
    assert [choice.delta.role for choice in deltas if choice.delta.role] == ["assistant"]
    assert len({chunk.id for chunk in chunks}) == 1
    counted = [chunk for chunk in chunks if chunk.usage is not None]
    assert len(counted) == int(usage)
    if usage:
        assert counted == chunks[-1:]
        assert not counted[0].choices
        assert whole.usage is not None
        assert counted[0].usage == whole.usage


def test_streamed_completion_is_the_whole_one_in_pieces(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {"prompt": ["one", "two"], "max_tokens": 20, "logprobs": 2, **GREEDY}
    whole = client.completions.create(**request)
    chunks = [
        choice for chunk in client.completions.create(stream=True, **request) for choice in chunk.choices
    ]
    for index, choice in enumerate(whole.choices):
        pieces = [piece for piece in chunks if piece.index == index]
        assert "".join(piece.text for piece in pieces) == choice.text
        assert [piece.finish_reason for piece in pieces if piece.finish_reason] == ["length"]
        assert choice.logprobs is not None
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            joined = [item for piece in pieces for item in getattr(piece.logprobs, name)]
            assert joined == getattr(choice.logprobs, name), name


def test_a_stream_ends_with_done(http: httpx.Client) -> None:
    body = {"prompt": "a", "max_tokens": 2, "stream": True}
    answer = http.post("/v1/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.endswith("\n\ndata: [DONE]\n\n")


def test_n_choices_have_the_seeds_that_follow(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {"model": MODEL_NAME, "prompt": "x", "max_tokens": 16, "temperature": 2.0}
    three = client.completions.create(n=3, seed=40, **request)
    alone = [client.completions.create(seed=seed, **request).choices[0].text for seed in (40, 41, 42)]
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert [choice.text for choice in three.choices] == alone
    assert len(set(alone)) == 3
    assert three.usage is not None
    # The prompt counts once, the choices each.
    assert (three.usage.prompt_tokens, three.usage.completion_tokens) == (1, 48)


def test_streamed_choices_of_a_chat_keep_apart(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {"model": MODEL_NAME, "messages": HELLO, "max_tokens": 10, "n": 2, "seed": 1}
    whole = client.chat.completions.create(**request)
    texts = ["", ""]
    for chunk in client.chat.completions.create(stream=True, **request):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


def test_prompts_as_text_and_as_ids_give_the_same(client: openai.OpenAI, tiny_tokens: Any) -> None:
    texts = ["alpha", "beta", "alpha beta"]
    ids = [tiny_tokens(text) for text in texts]
    one = [client.completions.create(prompt=text, **GREEDY).choices[0].text for text in texts]
    for batch in (texts, ids):
        answer = client.completions.create(prompt=batch, **GREEDY)
        assert [choice.text for choice in answer.choices] == one
    assert client.completions.create(prompt=ids[0], **GREEDY).choices[0].text == one[0]


@pytest.mark.parametrize("top", [None, 0, 1, 5])
def test_completion_logprobs(client: openai.OpenAI, top: int | None) -> None:
    answer = client.completions.create(prompt="hello", max_tokens=6, logprobs=top, **GREEDY)
    choice = answer.choices[0]
    if top is None:
        assert choice.logprobs is None
        return
    assert choice.logprobs is not None
    assert "".join(choice.logprobs.tokens or []) == choice.text
    assert choice.logprobs.text_offset == list(range(6))
    for value, likeliest in zip(
        choice.logprobs.token_logprobs or [], choice.logprobs.top_logprobs or [], strict=True
    ):
        assert len(likeliest) == max(top, 1)
        # Greedy sampling: the chosen token is the likeliest.
        assert value == max(likeliest.values()) <= 0


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        messages=HELLO, max_tokens=5, logprobs=True, top_logprobs=3, **GREEDY
    )
    choice = answer.choices[0]
    assert choice.logprobs is not None
    content = choice.logprobs.content or []
    assert "".join(entry.token for entry in content) == choice.message.content
    for entry in content:
        assert bytes(entry.bytes or []).decode() == entry.token
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob
        assert sorted((top.logprob for top in entry.top_logprobs), reverse=True) == [
            top.logprob for top in entry.top_logprobs
        ]
    without_top = client.chat.completions.create(messages=HELLO, max_tokens=2, logprobs=True, **GREEDY)
    assert without_top.choices[0].logprobs is not None
    assert all(entry.top_logprobs == [] for entry in without_top.choices[0].logprobs.content or [])


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI, stream: bool) -> None:
    text = client.completions.create(prompt="hello", max_tokens=24, **GREEDY).choices[0].text
    stop = text[10:13]
    request: dict[str, Any] = {"prompt": "hello", "max_tokens": 24, "stop": [stop, "0"], **GREEDY}
    if stream:
        choices = [
            choice for chunk in client.completions.create(stream=True, **request) for choice in chunk.choices
        ]
    else:
        choices = client.completions.create(**request).choices
    assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
    assert choices[-1].finish_reason == "stop"
    assert choices[-1].model_extra == {"stop_reason": stop}


def test_a_stop_token_ends_the_text(client: openai.OpenAI, tiny_tokens: Any) -> None:
    text = client.completions.create(prompt="hello", max_tokens=24, **GREEDY).choices[0].text
    (token,) = tiny_tokens(text[5])
    answer = client.completions.create(
        prompt="hello", max_tokens=24, extra_body={"stop_token_ids": [token]}, **GREEDY
    )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == text[: text.index(text[5])]


def test_a_prompt_may_leave_room_for_one_token(client: openai.OpenAI) -> None:
    answer = client.completions.create(prompt="x" * (CONTEXT - 1), max_tokens=5, **GREEDY)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 1
    assert answer.choices[0].finish_reason == "length"
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(prompt="x" * CONTEXT, max_tokens=1, **GREEDY)
    assert refused.value.code == "context_length_exceeded"


def test_many_requests_at_once_get_the_answers_of_each_alone(server: Server) -> None:
    import asyncio

    prompts = [f"prompt number {index}" for index in range(24)]

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            answers = await asyncio.gather(
                *(client.completions.create(prompt=prompt, max_tokens=20, **GREEDY) for prompt in prompts)
            )
            return [answer.choices[0].text for answer in answers]

    together = asyncio.run(ask_all())
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        alone = [
            client.completions.create(prompt=prompt, max_tokens=20, **GREEDY).choices[0].text
            for prompt in prompts[::6]
        ]
    assert together[::6] == alone


def test_metrics_count_what_was_done(client: openai.OpenAI, server: Server) -> None:
    names = ("prompt_tokens_total", "generation_tokens_total", "time_to_first_token_seconds_count",
             "inter_token_latency_seconds_count", "e2e_request_latency_seconds_count",
             "request_queue_time_seconds_count", "request_prefill_time_seconds_count",
             "request_decode_time_seconds_count", "request_inference_time_seconds_count",
             "request_prefill_kv_computed_tokens_count")  # fmt: skip
    server.wait_idle()
    before = [server.metric(name) for name in names]
    client.completions.create(prompt="abcdefg", max_tokens=10, **GREEDY)
    server.wait_idle()
    after = [server.metric(name) for name in names]
    assert [now - then for now, then in zip(after, before, strict=True)] == [7, 10, 1, 9, 1, 1, 1, 1, 1, 1]
    # A request's time is what it waited, what its prompt took, and what its tokens took.
    parts = sum(server.metric(f"request_{part}_time_seconds_sum") for part in ("queue", "prefill", "decode"))
    inference = sum(server.metric(f"request_{part}_time_seconds_sum") for part in ("prefill", "decode"))
    assert server.metric("request_inference_time_seconds_sum") == pytest.approx(inference)
    assert parts <= server.metric("e2e_request_latency_seconds_sum")
    assert server.metric("engine_up") == 1


def test_the_schema_names_the_routes(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics"} <= set(paths)
    # The pages that FastAPI offers would load scripts from elsewhere.
    assert http.get("/docs").status_code == 404
