"""Bad requests are refused with the field, the value and the limit; good ones survive the wire unchanged."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import msgspec
import pytest

from mainspring.engine.admission import check_request, make_request
from mainspring.engine.config import EngineConfig
from mainspring.engine.messages import EngineLimits, EngineRequest
from mainspring.engine.sampling_params import SamplingParams, StructuredOutputsParams
from mainspring.errors import ConfigError, InvalidRequestError, RequestTooLongError

LIMITS = EngineLimits(max_model_len=100, max_cache_tokens=64, vocab_size=50, max_logprobs=5)


@pytest.mark.parametrize(
    ("values", "param", "words"),
    [
        ({"temperature": -0.1}, "temperature", "-0.1"),
        ({"temperature": float("nan")}, "temperature", "nan"),
        ({"temperature": "hot"}, "temperature", "hot"),
        ({"top_p": 0}, "top_p", "above 0"),
        ({"top_p": 1.01}, "top_p", "1.01"),
        ({"min_p": -0.5}, "min_p", "-0.5"),
        ({"top_k": -2}, "top_k", "-2"),
        ({"top_k": 1.5}, "top_k", "1.5"),
        ({"seed": 2**63}, "seed", str(2**63)),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "max_tokens"),
        ({"stop": ""}, "stop", "empty"),
        ({"stop": ["a", 3]}, "stop", "3"),
        ({"stop": 3}, "stop", "3"),
        ({"stop_token_ids": 3}, "stop_token_ids", "3"),
        ({"stop_token_ids": [-1]}, "stop_token_ids", "-1"),
        ({"logprobs": -1}, "logprobs", "-1"),
        ({"prompt_logprobs": True}, "prompt_logprobs", "True"),
        ({"n": 0}, "n", "between 1 and 128"),
        ({"n": 129}, "n", "128"),
        ({"presence_penalty": 2.1}, "presence_penalty", "2.1"),
        ({"frequency_penalty": -3}, "frequency_penalty", "-3"),
        ({"repetition_penalty": 0}, "repetition_penalty", "between 0.01 and 100"),
        ({"logit_bias": [1]}, "logit_bias", "[1]"),
        ({"logit_bias": {-1: 2.0}}, "logit_bias", "-1"),
        ({"logit_bias": {1: 100.5}}, "logit_bias", "100.5"),
        ({"allowed_token_ids": []}, "allowed_token_ids", "at least one"),
        ({"allowed_token_ids": [1, -4]}, "allowed_token_ids", "-4"),
        ({"bad_words": "no"}, "bad_words", "'no'"),
        ({"bad_words": ["a", ""]}, "bad_words", "non-empty"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs", "StructuredOutputsParams"),
    ],
)
def test_sampling_params_refuse(values: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=r".*") as caught:
        SamplingParams(**values)
    assert caught.value.param == param
    assert words in str(caught.value)


def test_sampling_params_travel_unchanged_and_are_checked_on_arrival() -> None:
    params = SamplingParams(
        temperature=0, stop=["a", "b"], stop_token_ids=[3], logprobs=0, seed=-5, max_tokens=None
    )
    sent = msgspec.msgpack.encode(EngineRequest("x", [1, 2], params, (7,), 10))
    assert msgspec.msgpack.decode(sent, type=EngineRequest).params == params
    bad = msgspec.msgpack.encode({"temperature": -1.0})
    with pytest.raises(InvalidRequestError, match="temperature is -1"):
        msgspec.msgpack.decode(bad, type=SamplingParams)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "exactly one"),
        ({"regex": "a", "json_object": True}, "exactly one"),
        ({"json_object": False}, "leave it out"),
        ({"regex": ""}, "regex"),
        ({"grammar": 3}, "grammar"),
        ({"json": "{"}, "not a JSON schema"),
        ({"json": "[1]"}, "must hold a schema"),
        ({"json": {"const": object()}}, "not a JSON schema"),
        ({"choice": []}, "choice"),
        ({"choice": "yes"}, "choice"),
        ({"choice": ["yes", ""]}, "choice"),
    ],
)
def test_structured_outputs_refuse(values: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as caught:
        StructuredOutputsParams(**values)
    assert caught.value.param == "structured_outputs"


@pytest.mark.parametrize(
    "values",
    [{"json": {"type": "object"}}, {"json": '{"type": "object"}'}, {"regex": "a+"}, {"choice": ["a", "b"]},
     {"grammar": 'root ::= "a"'}, {"json_object": True}],
)  # fmt: skip
def test_structured_outputs_and_token_fields_travel_unchanged(values: dict[str, Any]) -> None:
    params = SamplingParams(
        structured_outputs=StructuredOutputsParams(**values), logit_bias={3: -1.5}, allowed_token_ids=[1, 2],
        bad_words=["x"], n=3, presence_penalty=1,
    )  # fmt: skip
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


def test_max_tokens_is_resolved_against_context_and_cache() -> None:
    roomy = msgspec.structs.replace(LIMITS, max_cache_tokens=1000)
    assert make_request("r", [1] * 10, SamplingParams(max_tokens=None), roomy, ()).max_tokens == 90
    assert make_request("r", [1] * 10, SamplingParams(max_tokens=500), roomy, ()).max_tokens == 90
    # 10 prompt tokens and 54 fed-back ones fill 64 places; the 55th generated token needs none.
    assert make_request("r", [1] * 10, SamplingParams(max_tokens=None), LIMITS, ()).max_tokens == 55


def test_a_prompt_of_the_context_less_one_is_taken_and_the_whole_context_refused() -> None:
    roomy = msgspec.structs.replace(LIMITS, max_cache_tokens=1000)
    assert make_request("r", [1] * 99, SamplingParams(max_tokens=8), roomy, ()).max_tokens == 1
    with pytest.raises(RequestTooLongError, match=r"100 tokens.*context is 100"):
        make_request("r", [1] * 100, SamplingParams(), roomy, ())


@pytest.mark.parametrize(("prompt", "max_tokens"), [(70, 1), (40, 26), (65, None)])
def test_what_the_cache_cannot_hold_is_refused(prompt: int, max_tokens: int | None) -> None:
    with pytest.raises(RequestTooLongError, match="holds 64"):
        make_request("r", [1] * prompt, SamplingParams(max_tokens=max_tokens), LIMITS, ())


def test_what_the_cache_just_holds_is_taken() -> None:
    assert make_request("r", [1] * 40, SamplingParams(max_tokens=25), LIMITS, ()).max_tokens == 25


@pytest.mark.parametrize(
    ("prompt", "params", "param", "words"),
    [
        ([], {}, "prompt", "empty"),
        ([1, 50], {}, "prompt", "50"),
        ([-1, 3], {}, "prompt", "-1"),
        ([1, "x"], {}, "prompt", "token ids"),
        ([1], {"stop_token_ids": [99]}, "stop_token_ids", "99"),
        ([1], {"logprobs": 6}, "logprobs", "at most 5"),
        ([1], {"prompt_logprobs": 6}, "prompt_logprobs", "at most 5"),
    ],
)
def test_malformed_requests_are_refused(
    prompt: list[Any], params: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(InvalidRequestError, match=words) as caught:
        make_request("r", prompt, SamplingParams(**params), LIMITS, ())
    assert caught.value.param == param


def test_the_engine_checks_a_request_that_was_built_by_hand() -> None:
    with pytest.raises(RequestTooLongError, match="max_tokens=95"):
        check_request(EngineRequest("r", [1] * 10, SamplingParams(), (), max_tokens=95), LIMITS)


@pytest.mark.parametrize(
    "values",
    [
        {"max_num_seqs": 0},
        {"block_size": -1},
        {"max_model_len": 1.5},
        {"max_logprobs": -1},
        {"kv_cache_bytes": 100, "num_blocks": 3},
    ],
)
def test_engine_config_refuses(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        EngineConfig(**values)


def test_the_callers_side_of_the_border_loads_no_pytorch() -> None:
    modules = "admission, config, messages, output_processor, outputs, sampling_params"
    code = f"import sys; from mainspring.engine import {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
