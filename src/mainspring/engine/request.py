"""A request inside the engine: its tokens, what of them is computed, and where their keys and values lie."""

from __future__ import annotations

from mainspring.engine.messages import EngineRequest, TokenLogprobs
from mainspring.engine.outputs import FinishReason
from mainspring.engine.sampling_params import SamplingParams


class Request:
    """The mutable state of one request.

    Attributes:
        token_ids: the prompt and everything generated so far.
        num_prompt: how many of them are the prompt.
        num_prompt_counted: how many of those the statistics have counted; a recomputation counts no more.
        num_computed: how many tokens have their keys and values in the cache (0 after a preemption).
        block_table: the cache blocks of the sequence, in order; owned by the scheduler.
        random_key: with the number of generated tokens it fixes the next random number.
        rope_length: the longest the sequence can become; fixes the base of `dynamic` RoPE for its whole life.
        prompt_logprobs: filled chunk by chunk while the prompt is computed for the first time.
    """

    __slots__ = (
        "block_table",
        "eos_token_ids",
        "ignored_stop_ids",
        "max_tokens",
        "num_computed",
        "num_prompt",
        "num_prompt_counted",
        "params",
        "prompt_logprobs",
        "random_key",
        "request_id",
        "rope_length",
        "stop_token_ids",
        "token_ids",
    )

    def __init__(self, request: EngineRequest, random_key: int) -> None:
        self.request_id = request.request_id
        self.params: SamplingParams = request.params
        self.max_tokens = request.max_tokens
        self.token_ids = list(request.prompt_token_ids)
        self.num_prompt = len(self.token_ids)
        self.num_prompt_counted = 0
        self.num_computed = 0
        self.block_table: list[int] = []
        self.random_key = random_key
        self.rope_length = self.num_prompt + request.max_tokens
        self.eos_token_ids = frozenset(() if request.params.ignore_eos else request.eos_token_ids)
        self.stop_token_ids = frozenset(request.params.stop_token_ids or ())
        # What must not be sampled before min_tokens are there.
        self.ignored_stop_ids = sorted(self.eos_token_ids | self.stop_token_ids)
        self.prompt_logprobs: list[TokenLogprobs | None] | None = (
            None if request.params.prompt_logprobs is None else [None]
        )

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def forbids_stopping(self) -> bool:
        """The next token must not be one that ends the request."""
        return self.num_generated < self.params.min_tokens and bool(self.ignored_stop_ids)

    def append(self, token_id: int) -> tuple[FinishReason | None, int | None]:
        """Add a generated token. Returns the finish reason, and the stop token's id if one ended it."""
        self.token_ids.append(token_id)
        if token_id in self.eos_token_ids:
            return "stop", None
        if token_id in self.stop_token_ids:
            return "stop", token_id
        if self.num_generated >= self.max_tokens:
            return "length", None
        return None, None
