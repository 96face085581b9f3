"""The engine: token ids in, token ids out, one `step()` at a time. It knows no text."""

from __future__ import annotations

import random

import torch

from mainspring.engine import sizing
from mainspring.engine.admission import check_request
from mainspring.engine.block_allocator import BlockAllocator
from mainspring.engine.config import EngineConfig
from mainspring.engine.messages import EngineLimits, EngineRequest, EngineStats, TokenLogprobs, TokenOutput
from mainspring.engine.model_runner import ModelRunner
from mainspring.engine.outputs import FinishReason
from mainspring.engine.random_numbers import key_from_seed
from mainspring.engine.request import Request
from mainspring.engine.sampler import sample
from mainspring.engine.scheduler import Scheduler
from mainspring.engine.threads import single_threaded
from mainspring.errors import InvalidRequestError
from mainspring.model.decoder import Decoder

__all__ = ["EngineCore", "EngineLimits", "EngineRequest", "EngineStats", "TokenLogprobs", "TokenOutput"]


class EngineCore:
    """Continuous batching over one model. Not thread-safe: one thread adds, aborts and steps.

    Raises:
        ConfigError: the settings do not fit the model or the machine.
    """

    def __init__(self, model: Decoder, config: EngineConfig | None = None) -> None:
        config = config if config is not None else EngineConfig()
        max_model_len = sizing.max_model_len(config, model.config)
        num_blocks = sizing.num_cache_blocks(config, model.config, model.dtype, model.device, max_model_len)
        self.config = config
        self.limits = EngineLimits(
            max_model_len=max_model_len,
            max_cache_tokens=num_blocks * config.block_size,
            vocab_size=model.config.vocab_size,
            max_logprobs=config.max_logprobs,
        )
        budget = sizing.max_num_batched_tokens(config, model.device)
        seats = min(config.max_num_seqs, budget)
        self._allocator = BlockAllocator(num_blocks)
        self._scheduler = Scheduler(self._allocator, config.block_size, seats, budget)
        self._runner = ModelRunner(model, num_blocks, config.block_size)
        self._random = random.Random(config.seed)
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        self._num_steps = 0
        self._finished: dict[FinishReason, int] = {"stop": 0, "length": 0, "abort": 0}

    def add_request(self, request: EngineRequest) -> None:
        """Queue a request.

        Raises:
            InvalidRequestError: malformed, or its id is in use; RequestTooLongError: it can never fit.
        """
        check_request(request, self.limits)
        if request.request_id in self._scheduler:
            raise InvalidRequestError(
                f"request id {request.request_id!r} is in use; give another", "request_id"
            )
        seed = request.params.seed
        key = self._random.getrandbits(64) if seed is None else key_from_seed(seed)
        self._scheduler.add(Request(request, key))

    def abort(self, request_id: str) -> bool:
        """Drop a request and free its blocks at once; no output follows. False if it is not there (any more)."""
        if self._scheduler.remove(request_id) is None:
            return False
        self._finished["abort"] += 1
        return True

    def has_work(self) -> bool:
        return bool(self._scheduler.running or self._scheduler.waiting)

    @torch.inference_mode()
    def step(self) -> list[TokenOutput]:
        """One forward pass; the new token of every request that reached its last known one. [] without work."""
        scheduled = self._scheduler.schedule()
        if not scheduled:
            return []
        logits = self._runner.run(scheduled)
        requests = [item.request for item in scheduled if item.samples]
        tokens: list[int] = []
        logprobs: list[TokenLogprobs | None] = []
        if logits is not None:
            with single_threaded():
                tokens = sample(logits, requests)
                logprobs = self._runner.sampled_logprobs(logits, tokens, requests)
        for item in scheduled:
            self._advance(item.request, item.num_tokens)
        self._num_steps += 1
        self._num_generated_tokens += len(tokens)
        return [
            self._output(request, token, entry)
            for request, token, entry in zip(requests, tokens, logprobs, strict=True)
        ]

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            kv_blocks_used=self._allocator.num_used,
            kv_blocks_total=self._allocator.num_blocks,
            block_size=self.config.block_size,
            prompt_tokens_total=self._num_prompt_tokens,
            generation_tokens_total=self._num_generated_tokens,
            preemptions_total=self._scheduler.num_preemptions,
            steps_total=self._num_steps,
            finished_total=dict(self._finished),
        )

    def check_integrity(self) -> None:
        """Hold the block books against the block tables; meant for idle moments and for tests.

        Raises:
            BlockAccountingError: a block is lost or miscounted.
        """
        requests = [*self._scheduler.running.values(), *self._scheduler.waiting.values()]
        self._allocator.check(request.block_table for request in requests)

    def _advance(self, request: Request, num_tokens: int) -> None:
        request.num_computed += num_tokens
        newly_computed = min(request.num_computed, request.num_prompt) - request.num_prompt_counted
        if newly_computed > 0:
            self._num_prompt_tokens += newly_computed
            request.num_prompt_counted += newly_computed

    def _output(self, request: Request, token: int, logprobs: TokenLogprobs | None) -> TokenOutput:
        is_first = request.num_generated == 0
        finish_reason, stop_reason = request.append(token)
        if finish_reason is not None:
            self._scheduler.remove(request.request_id)
            self._finished[finish_reason] += 1
        return TokenOutput(
            request_id=request.request_id,
            token_ids=[token],
            logprobs=None if logprobs is None else [logprobs],
            prompt_logprobs=request.prompt_logprobs if is_first else None,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            rope_length=request.rope_length if is_first else None,
        )
