"""What a caller gets back for a request: text, tokens and log-probabilities. Names as in vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's log-probability at one position.

    Attributes:
        logprob: natural logarithm, from the raw logits; a float32 value held exactly.
        rank: 1 for the likeliest token.
        decoded_token: its text on its own, None where the engine has no tokenizer.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


# The generated (or the prompt's) token comes first, then the most likely ones in order.
PositionLogprobs = dict[int, Logprob]


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a prompt.

    Attributes:
        index: its number among the completions of the prompt.
        text: the generated text, without the stop string that ended it (unless asked for).
        token_ids: every generated token, an end-of-text or stop token included.
        cumulative_logprob: sum of the generated tokens' log-probabilities so far, None without `logprobs`.
        logprobs: one dictionary a generated token, None without `logprobs`.
        finish_reason: None while the request runs.
        stop_reason: the stop string or the stop token id that ended it; None for end of text and for length.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class RequestOutput:
    """The state of a request after a step, or at its end.

    Attributes:
        prompt: the prompt's text, None when token ids were given.
        prompt_token_ids: the prompt as the model saw it.
        prompt_logprobs: one entry a prompt token, the first None; None without `prompt_logprobs`.
        outputs: the completions.
        finished: nothing more will come for this request.
        rope_length: the length in tokens for which the request's RoPE base was fixed (`dynamic` scaling
            depends on it): what `Decoder.log_probs(..., rope_length=...)` takes to score the same tokens.
        num_cached_tokens: prompt tokens whose keys and values were found in the cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    finished: bool = False
    rope_length: int | None = None
    num_cached_tokens: int = 0
