"""A request inside the engine: its tokens, what of them is computed, and where their keys and values lie."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from mainspring.engine.grammar import Grammar
from mainspring.engine.messages import EngineRequest, TokenLogprobs
from mainspring.engine.outputs import FinishReason
from mainspring.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from torch import Tensor

NO_SEAT = -1


class Request:
    """The mutable state of one request.

    Attributes:
        token_ids: the prompt and every generated token that is known here.
        num_in_flight: further tokens, sampled by steps whose results have not come yet (0 or 1).
        num_prompt: how many of the tokens are the prompt.
        num_prompt_counted: how many of those the statistics have counted; a recomputation counts no more.
        num_cached: prompt tokens whose keys and values were found in the cache at the first admission.
        num_computed: how many tokens have keys and values in the cache, as far as steps have been launched
            (0 after a preemption).
        block_table: the cache blocks of the sequence, in order; owned by the scheduler.
        cache_root, block_hashes: where the chain of hashes of the full blocks of known tokens begins, and the chain as
            far as it was needed.
        num_published: how many blocks of the table have been named by their hashes.
        seat: the row of the device's tables, NO_SEAT while it waits; owned by the scheduler.
        is_seated: the seat's rows on the device hold the tokens that were known when it sat down.
        num_blocks_uploaded: how many blocks of the table the seat's row on the device holds.
        draft_token_ids: guesses of the next tokens, to be verified in the next step.
        is_drafted: a drafter may propose tokens, so each step waits for the tokens of the one before.
        grammar: what the next token may be, or None.
        lora_id: the adapter, 0 for none.
        random_key: with its position it fixes the random numbers of a token.
        rope_length: the longest the sequence can become; fixes the base of `dynamic` RoPE for its whole life.
        prompt_logprobs: filled chunk by chunk while the prompt is computed for the first time.
        num_prompt_logprobs: how many of them are there or in flight.
        fork_of: the id of an earlier request with the same prompt, whose blocks this one shares.
        pooling: "mean" or "last": the result is a vector of hidden states instead of tokens.
        hidden_chunks: (start, hidden states) of the prompt's chunks, kept for the mean.
        priority, arrival: the order of the line; see `Scheduler`.
        queued_at: when it came, in seconds of the monotonic clock.
        queue_seconds: from then until its first step was launched.
        is_finished: its last output has been made, or it was aborted: results still in flight are dropped.
    """

    __slots__ = (
        "arrival",
        "block_hashes",
        "block_table",
        "cache_root",
        "draft_token_ids",
        "eos_token_ids",
        "fork_of",
        "grammar",
        "hidden_chunks",
        "ignored_stop_ids",
        "is_drafted",
        "is_finished",
        "is_seated",
        "lora_id",
        "max_tokens",
        "num_blocks_uploaded",
        "num_cached",
        "num_computed",
        "num_in_flight",
        "num_prompt",
        "num_prompt_counted",
        "num_prompt_logprobs",
        "num_published",
        "params",
        "pooling",
        "priority",
        "prompt_logprobs",
        "queue_seconds",
        "queued_at",
        "random_key",
        "request_id",
        "rope_length",
        "seat",
        "stop_token_ids",
        "token_ids",
    )

    def __init__(self, request: EngineRequest, random_key: int) -> None:
        self.request_id = request.request_id
        self.params: SamplingParams = request.params
        self.max_tokens = request.max_tokens
        self.pooling = request.pooling
        self.hidden_chunks: list[tuple[int, Tensor]] = []
        self.fork_of = request.fork_of
        self.priority = request.priority
        self.arrival = 0
        self.queued_at = time.monotonic()
        self.queue_seconds: float | None = None
        self.token_ids = list(request.prompt_token_ids)
        self.num_in_flight = 0
        self.num_prompt = len(self.token_ids)
        self.num_prompt_counted = 0
        self.num_cached = -1
        self.num_computed = 0
        self.block_table: list[int] = []
        self.block_hashes: list[bytes] = []
        self.cache_root: bytes = b""
        self.seat = NO_SEAT
        self.num_published = 0
        self.is_seated = False
        self.num_blocks_uploaded = 0
        self.draft_token_ids: list[int] = []
        self.is_drafted = False
        self.is_finished = False
        self.grammar: Grammar | None = None
        self.lora_id = request.lora_id
        self.random_key = random_key
        self.rope_length = self.num_prompt + request.max_tokens
        self.eos_token_ids = frozenset(() if request.params.ignore_eos else request.eos_token_ids)
        self.stop_token_ids = frozenset(request.params.stop_token_ids or ())
        # What must not be sampled before min_tokens are there.
        self.ignored_stop_ids = sorted(self.eos_token_ids | self.stop_token_ids)
        self.prompt_logprobs: list[TokenLogprobs | None] | None = (
            None if request.params.prompt_logprobs is None else [None]
        )
        self.num_prompt_logprobs = 1

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequence, those in flight included."""
        return len(self.token_ids) + self.num_in_flight

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) + self.num_in_flight - self.num_prompt

    @property
    def is_exhausted(self) -> bool:
        """Its last token is there or in flight: there is nothing more to compute."""
        if self.pooling is not None:
            return self.num_computed >= self.num_prompt
        return len(self.token_ids) + self.num_in_flight - self.num_prompt >= self.max_tokens

    @property
    def waits_for_tokens(self) -> bool:
        """Its next step needs the tokens of the one before on the host."""
        return self.grammar is not None or self.is_drafted

    @property
    def decodes(self) -> bool:
        """All its tokens are known, and all but the last are computed."""
        return self.num_in_flight == 0 and self.num_computed == len(self.token_ids) - 1

    @property
    def forbids_stopping(self) -> bool:
        """The next token must not be one that ends the request."""
        return self.num_generated < self.params.min_tokens and bool(self.ignored_stop_ids)

    @property
    def needs_all_hidden_states(self) -> bool:
        """No part of the prompt may be taken from the cache: its hidden states are wanted."""
        wants_logprobs = self.prompt_logprobs is not None and self.num_prompt_logprobs < self.num_prompt
        return wants_logprobs or self.pooling == "mean"

    @property
    def rank(self) -> tuple[int, int]:
        """Its place in the line: the lower, the earlier it is served."""
        return self.priority, self.arrival

    def max_drafts(self) -> int:
        """How many drafted tokens could still be kept, beside the one that is sampled anyway."""
        return max(0, self.max_tokens - self.num_generated - 1)

    def leave_seat(self) -> None:
        """Nothing of it is in the cache or on the device any more."""
        self.block_table = []
        self.num_computed = 0
        self.num_published = 0
        self.num_blocks_uploaded = 0
        self.is_seated = False
        self.seat = NO_SEAT
        self.draft_token_ids = []

    def append(self, token_id: int) -> tuple[FinishReason | None, int | None]:
        """Add a generated token. Returns the finish reason, and the stop token's id if one ended it."""
        self.token_ids.append(token_id)
        if token_id in self.eos_token_ids:
            return "stop", None
        if token_id in self.stop_token_ids:
            return "stop", token_id
        # A token that the grammar cannot follow ends the text as well: nothing sensible can come after it.
        if self.grammar is not None and (not self.grammar.accept(token_id) or self.grammar.terminated):
            return "stop", None
        if len(self.token_ids) - self.num_prompt >= self.max_tokens:
            return "length", None
        return None, None
