"""What crosses the border of the engine: requests in, tokens out. Plain msgpack values; needs no PyTorch.

The engine core speaks token ids only. Text is made and stop strings are found on the other side of this
border, in `output_processor.py`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from mainspring.engine.outputs import FinishReason
from mainspring.engine.sampling_params import SamplingParams

Pooling = Literal["mean", "last"]


class EngineLimits(msgspec.Struct, frozen=True):
    """What a request must fit in; the engine tells its clients, so that they refuse before sending.

    Attributes:
        max_model_len: longest sequence, prompt and completion together, in tokens.
        max_cache_tokens: tokens that the whole KV cache holds.
        vocab_size: token ids lie in [0, vocab_size).
        max_logprobs: most alternatives that `logprobs` and `prompt_logprobs` may ask for.
        num_adapters: the ids of LoRA adapters lie in [1, num_adapters].
    """

    max_model_len: int
    max_cache_tokens: int
    vocab_size: int
    max_logprobs: int
    num_adapters: int = 0


class EngineRequest(msgspec.Struct, frozen=True):
    """A request as the engine takes it; `admission.make_request` builds one and checks it.

    Attributes:
        eos_token_ids: tokens that end the request unless `params.ignore_eos`.
        max_tokens: most tokens to generate, resolved against context and cache
            (`params.max_tokens` may be None).
        priority: lower is served earlier, where the scheduling policy is "priority".
        cache_salt: requests share cached prefixes only with those of the same salt.
        lora_id: the adapter of the linear layers, 0 for none.
        pooling: make a vector of the prompt's hidden states (after the final norm) instead of tokens.
        fork_of: an earlier request with the same prompt, whose blocks this one shares (`n` > 1): it waits until that
            one's prompt is computed.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    eos_token_ids: tuple[int, ...]
    max_tokens: int
    priority: int = 0
    cache_salt: str | None = None
    lora_id: int = 0
    pooling: Pooling | None = None
    fork_of: str | None = None


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position.

    Attributes:
        token_ids: the token that stands there first, then the most likely ones in order.
        logprobs: their natural-log probabilities, float32 values held exactly.
        rank: the first token's rank, 1 for the likeliest. The others' ranks are 1, 2, 3 ...
    """

    token_ids: list[int]
    logprobs: list[float]
    rank: int


class TokenOutput(msgspec.Struct, omit_defaults=True):
    """What a step gave for one request.

    Attributes:
        token_ids: the newly generated tokens.
        logprobs: one entry a new token, None when the request did not ask.
        prompt_logprobs: one entry a prompt token, the first None; sent once, with the first token.
        finish_reason: set with the last output of the request.
        stop_reason: the id of the stop token that ended it, if one of `stop_token_ids` did.
        num_cached_tokens: prompt tokens that needed no computing.
        rope_length: the length for which the request's RoPE base was fixed.
        embedding: [hidden] the pooled hidden states of a request with `pooling`, float32 values held exactly.
        queue_seconds: with the first token, how long the request waited until its first step was launched.
    """

    request_id: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    num_cached_tokens: int = 0
    rope_length: int | None = None
    embedding: list[float] | None = None
    queue_seconds: float | None = None


class EngineStats(msgspec.Struct, frozen=True):
    """A snapshot for `/metrics`; the totals count since the engine started.

    Attributes:
        running: requests that hold KV blocks.
        waiting: requests that wait for a seat or for blocks.
        kv_blocks_used / kv_blocks_total: blocks of `block_size` tokens.
        prompt_tokens_total: prompt tokens computed or found in the cache (a recomputed token counts once).
        generation_tokens_total: tokens generated.
        preemptions_total: times that a request gave its blocks back and had to be recomputed.
        steps_total: forward passes.
        finished_total: requests ended, by finish reason.
        prefix_cache_queries_total: prompt tokens of admitted requests that were looked up in the prefix cache.
        prefix_cache_hits_total: how many of those were found.
        draft_tokens_total: drafted tokens that were verified.
        accepted_tokens_total: how many of those were accepted.
        drafts_total: how many times tokens of a request were drafted and verified.
        accepted_tokens_per_position: in how many of those the first, second, ... token was accepted.
    """

    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks_total: int
    block_size: int
    prompt_tokens_total: int
    generation_tokens_total: int
    preemptions_total: int
    steps_total: int
    finished_total: dict[FinishReason, int]
    prefix_cache_queries_total: int = 0
    prefix_cache_hits_total: int = 0
    draft_tokens_total: int = 0
    accepted_tokens_total: int = 0
    drafts_total: int = 0
    accepted_tokens_per_position: tuple[int, ...] = ()
