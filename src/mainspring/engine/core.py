"""The engine: token ids in, token ids out, one `step()` at a time. It knows no text."""

from __future__ import annotations

import logging
import random
import time
from collections import deque
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from mainspring.engine import sizing
from mainspring.engine.admission import check_request
from mainspring.engine.block_allocator import BlockAllocator
from mainspring.engine.block_hash import root_hash
from mainspring.engine.config import EngineConfig
from mainspring.engine.counters import Counters
from mainspring.engine.drafters import blocks_beside, load_draft_model, make_drafter
from mainspring.engine.messages import EngineLimits, EngineRequest, EngineStats, TokenLogprobs, TokenOutput
from mainspring.engine.model_runner import ModelRunner, StepResult
from mainspring.engine.outputs import FinishReason
from mainspring.engine.random_numbers import key_from_seed
from mainspring.engine.request import Request
from mainspring.engine.sampler import SeatSampler
from mainspring.engine.scheduler import ScheduledRequest, Scheduler
from mainspring.engine.served_model import (
    ServedModel,
    cache_shape,
    check_ranks,
    check_supported,
    close_model,
    free_memory,
    load_adapters,
    replace_weights,
    supports_graphs,
    watched,
)
from mainspring.engine.speculative import may_draft
from mainspring.engine.token_rules import TokenRules
from mainspring.engine.weights import broadcast_weights, weights_checksum
from mainspring.errors import ConfigError, InvalidRequestError
from mainspring.formats.tokenizer import Tokenizer
from mainspring.model.decoder import Decoder

__all__ = ["EngineCore", "EngineLimits", "EngineRequest", "EngineStats", "TokenLogprobs", "TokenOutput"]

log = logging.getLogger(__name__)


class EngineCore:
    """Continuous batching over one model. Not thread-safe: one thread adds, aborts and steps.

    On a GPU a step is launched before the results of the one before have come: a request's end by a stop token is
    found out one step late, and what that step sampled for it is dropped.

    Raises:
        ConfigError: the settings do not fit the model or the machine.
    """

    def __init__(
        self,
        model: ServedModel,
        config: EngineConfig | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        draft_model: Decoder | None = None,
    ) -> None:
        """tokenizer: for requests with bad words or a structure to follow; without one they are refused.
        draft_model: a loaded one, instead of a name in `config.speculative`."""
        config = config if config is not None else EngineConfig()
        check_supported(model, config)
        device = model.device
        draft = draft_model if draft_model is not None else load_draft_model(config.speculative, model)
        max_model_len = sizing.max_model_len(config, model.config)
        cache_dtype = sizing.cache_dtype(config, model.dtype, device)
        held, free = cache_shape(model), lambda: free_memory(model)
        sized = model.config, cache_dtype, device, max_model_len
        config = sizing.with_seats(config, *sized, shape=held, free=free)
        num_blocks = sizing.num_cache_blocks(config, *sized, shape=held, free=free)
        if draft is not None and config.num_blocks is None:
            num_blocks = blocks_beside(num_blocks, model, cache_dtype, draft)
        self.config = config
        self.limits = EngineLimits(
            max_model_len=max_model_len,
            max_cache_tokens=num_blocks * config.block_size,
            vocab_size=model.config.vocab_size,
            max_logprobs=config.max_logprobs,
            num_adapters=len(config.lora_adapters or {}),
        )
        seats = sizing.max_num_seqs(config, device)
        self._model = model
        self._allocator = BlockAllocator(num_blocks)
        self._scheduler = Scheduler(
            self._allocator,
            config.block_size,
            seats,
            sizing.max_num_batched_tokens(config, device),
            policy=config.scheduling_policy,
            prefix_caching=config.enable_prefix_caching,
        )
        self._sampler = SeatSampler(seats, model.config.vocab_size, device)
        ends = () if tokenizer is None else tokenizer.eos_token_ids
        self._rules = TokenRules(tokenizer, model.config.vocab_size, (*model.config.eos_token_ids, *ends))
        self._drafter = make_drafter(
            config.speculative, model, draft, self._sampler, num_blocks, config.block_size
        )
        self._runner = ModelRunner(
            model,
            self._sampler,
            num_blocks=num_blocks,
            block_size=config.block_size,
            num_seats=seats,
            max_model_len=max_model_len,
            cache_dtype=cache_dtype,
            max_num_tokens=sizing.max_num_batched_tokens(config, device),
            graphs=supports_graphs(model) if config.cuda_graphs is None else config.cuda_graphs,
            logprobs_temperature=config.logprobs_temperature,
        )
        if config.lora_adapters:
            self._runner.adapters = load_adapters(model, config.lora_adapters)
        # Steps that have been launched and whose results have not been looked at; at most so many more than one.
        self._launched: deque[StepResult] = deque()
        asynchronous = device.type == "cuda" if config.async_scheduling is None else config.async_scheduling
        self._lag = 1 if asynchronous else 0
        self._paused = False
        self._random = random.Random(config.seed)
        self._counters = Counters(config.speculative.num_speculative_tokens if config.speculative else 0)
        log.info("%s", self.describe())

    def describe(self) -> str:
        """One line on what fits."""
        tokens, longest = self.limits.max_cache_tokens, self.limits.max_model_len
        return (
            f"KV cache: {tokens:,} tokens in {self._allocator.num_blocks:,} blocks of {self.config.block_size} "
            f"({self._runner.cache_bytes / 2**30:.2f} GiB, {self._runner.cache_dtype_name}): "
            f"{tokens / longest:.1f} sequences of the greatest length, {longest:,} tokens"
        )

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
        state = Request(request, key)
        state.grammar = self._rules.of(request.params)
        state.is_drafted = self._drafter is not None and may_draft(request.params)
        own_base = self._runner.rope_depends_on_length(state.rope_length)
        state.cache_root = root_hash(
            request.cache_salt, request.lora_id, state.rope_length if own_base else None
        )
        self._scheduler.add(state)

    def abort(self, request_id: str) -> bool:
        """Drop a request and free its blocks at once; no output follows. False if it is not there (any more)."""
        request = self._scheduler.remove(request_id)
        if request is None:
            return False
        request.is_finished = True
        self._counters.finished["abort"] += 1
        return True

    def has_work(self) -> bool:
        """There is something that a step could do now; while paused, only to hand out what is under way."""
        if self._launched:
            return True
        return not self._paused and bool(self._scheduler.running or self._scheduler.waiting)

    @property
    def is_lockstep(self) -> bool:
        """The reported log-probabilities are the trainer's, bit for bit."""
        return self._model.numerics == "lockstep" and self.config.kv_cache_dtype == "auto"

    @property
    def is_sleeping(self) -> bool:
        return not self._runner.has_cache

    def pause(self) -> None:
        """Launch no further steps until `resume`; requests keep their places, and more can be added."""
        self._paused = True

    def resume(self) -> None:
        """Go on after `pause`. Raises ConfigError while the engine sleeps."""
        if self.is_sleeping:
            raise ConfigError("the engine sleeps; wake it, and it goes on")
        self._paused = False

    def reset_prefix_cache(self) -> None:
        """Share no block that was computed before; requests that run keep theirs."""
        self._scheduler.forget_prefixes()

    @torch.inference_mode()
    def sleep(self) -> list[TokenOutput]:
        """Give back the cache's memory, and a draft model's; pause. What runs is computed again after `wake`.

        Returns the outputs of the step that was under way.
        """
        self._paused = True
        outputs = [output for step in self._launched for output in self._collect(step)]
        self._launched.clear()
        self._scheduler.preempt_all()
        self._scheduler.forget_prefixes()
        if self._drafter is not None:
            self._drafter.free_cache()
        self._runner.free_cache()
        return outputs

    @torch.inference_mode()
    def wake(self) -> None:
        """Take the cache's memory again and go on."""
        self._runner.allocate_cache()
        self._paused = False

    def update_weights(self, state_dict: Mapping[str, Tensor]) -> str:
        """Copy new weights into the model's own tensors; no cached prefix outlives them.

        Tokens of running requests that come later are the new weights', over keys of the old ones, unless all are
        recomputed: `sleep` and `wake` around it, or update while nothing runs.

        Returns the checksum of all weights (`weights_checksum`). Raises CheckpointError; then nothing has changed.
        """
        checksum = replace_weights(self._model, state_dict)
        self._scheduler.forget_prefixes()
        return checksum

    @torch.inference_mode()
    def step(self) -> list[TokenOutput]:
        """Launch the next forward pass, and give the new tokens of the one before (on a CPU: of this one).

        [] without work, and where nothing has come yet.
        """
        with watched(self._model):
            return self._step()

    def _step(self) -> list[TokenOutput]:
        scheduled: list[ScheduledRequest] = []
        if not self._paused:
            self._draft()
            scheduled = self._scheduler.schedule()
        if scheduled:
            self._launched.append(self._runner.launch(scheduled, self._scheduler.block_copies))
            self._scheduler.block_copies.clear()
            self._counters.steps += 1
            for item in scheduled:
                self._advance(item)
        if len(self._launched) > self._lag or (self._launched and not scheduled):
            return self._collect(self._launched.popleft())
        return []

    def receive_weights(self, source: int, group: dist.ProcessGroup | None = None) -> str:
        """As `update_weights`, from process `source` of a torch.distributed group, which calls `broadcast_weights`.

        Returns the checksum, to be compared with the sender's. Raises CheckpointError; then nothing has changed. Raises
        ConfigError under a layout, whose ranks are in a group of their own.
        """
        if not isinstance(self._model, Decoder):
            raise ConfigError(
                "an engine under a layout receives no broadcast: its ranks form a group of their own; "
                "give it the tensors (update_weights) or a directory"
            )
        broadcast_weights(self._model, source, group)
        self._scheduler.forget_prefixes()
        return weights_checksum(self._model)

    def check_ranks(self) -> None:
        """Raises EngineDeadError if another process of the model has ended; nothing can be computed any more."""
        check_ranks(self._model)

    def close(self) -> None:
        """Ends the other processes of a model that is spread over several."""
        close_model(self._model)

    def stats(self) -> EngineStats:
        """What has been done so far, and what is held now."""
        return self._counters.stats(self._scheduler, self._allocator, self.config.block_size)

    def check_integrity(self) -> None:
        """Hold the block books against the block tables; meant for idle moments and for tests.

        Raises:
            BlockAccountingError: a block is lost or miscounted.
        """
        requests = [*self._scheduler.running.values(), *self._scheduler.waiting]
        self._allocator.check(request.block_table for request in requests)

    def _draft(self) -> None:
        if self._drafter is not None:
            running = self._scheduler.running.values()
            ready = [request for request in running if request.is_drafted and request.decodes]
            if ready:
                self._drafter.propose(ready)

    def _advance(self, item: ScheduledRequest) -> None:
        """The step of `item` is under way: count what it computes as done."""
        request = item.request
        # Whether drafts are kept is known later.
        request.num_computed = item.start + item.num_tokens - item.num_drafts
        request.num_in_flight += item.samples
        request.is_seated = True
        if request.queue_seconds is None:
            request.queue_seconds = time.monotonic() - request.queued_at
        request.num_blocks_uploaded = len(request.block_table)
        newly_computed = min(request.num_computed, request.num_prompt) - request.num_prompt_counted
        if newly_computed > 0:
            self._counters.prompt_tokens += newly_computed
            request.num_prompt_counted += newly_computed
        if request.prompt_logprobs is not None:
            reported = min(request.num_computed + 1, request.num_prompt)
            request.num_prompt_logprobs = max(request.num_prompt_logprobs, reported)
        self._scheduler.publish(request)

    def _collect(self, step: StepResult) -> list[TokenOutput]:
        """Wait for a launched step and hand out what it gave."""
        with watched(self._model):
            step.wait()
        check_ranks(self._model)
        for request, tensors in step.prompt_logprobs:
            assert request.prompt_logprobs is not None
            request.prompt_logprobs += tensors.entries(
                [request.params.prompt_logprobs or 0] * len(tensors.tokens)
            )
        tokens: list[int] = [] if step.tokens is None else step.tokens.tolist()
        entries = step.logprob_entries()
        outputs = []
        row = 0
        for item in step.scheduled:
            if not item.samples:
                continue
            rows = range(row, row + 1 + item.num_drafts)
            row = rows.stop
            if not item.request.is_finished:
                outputs.append(
                    self._output(item, [tokens[r] for r in rows], [entries[r] for r in rows if r in entries])
                )
        for request, embedding in step.embeddings:
            if not request.is_finished:
                outputs.append(self._pooled(request, embedding.tolist()))
        return outputs

    def _output(
        self, item: ScheduledRequest, sampled: list[int], logprobs: list[TokenLogprobs]
    ) -> TokenOutput:
        """Append the sampled tokens, up to the first that differs from its draft, or that ends the request."""
        request = item.request
        is_first = len(request.token_ids) == request.num_prompt
        request.num_in_flight -= 1
        drafts, request.draft_token_ids = request.draft_token_ids[: item.num_drafts], []
        kept = 0
        finish_reason: FinishReason | None = None
        stop_reason: int | None = None
        for token in sampled:
            finish_reason, stop_reason = request.append(token)
            kept += 1
            if finish_reason is not None or kept > len(drafts) or token != drafts[kept - 1]:
                break
        self._counters.generated_tokens += kept
        self._counters.count_drafts(drafts, sampled[:kept])
        if request.is_seated:  # else it was preempted meanwhile, and starts again
            request.num_computed += kept - 1
            self._scheduler.publish(request)
        if finish_reason is not None:
            self._finish(request, finish_reason)
        return TokenOutput(
            request_id=request.request_id,
            token_ids=sampled[:kept],
            logprobs=logprobs[:kept] if logprobs else None,
            prompt_logprobs=request.prompt_logprobs if is_first else None,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            num_cached_tokens=request.num_cached if is_first else 0,
            rope_length=request.rope_length if is_first else None,
            queue_seconds=request.queue_seconds if is_first else None,
        )

    def _pooled(self, request: Request, embedding: list[float]) -> TokenOutput:
        self._finish(request, "stop")
        return TokenOutput(
            request_id=request.request_id,
            token_ids=[],
            prompt_logprobs=request.prompt_logprobs,
            finish_reason="stop",
            num_cached_tokens=request.num_cached,
            embedding=embedding,
        )

    def _finish(self, request: Request, reason: FinishReason) -> None:
        self._scheduler.remove(request.request_id)
        request.is_finished = True
        self._counters.finished[reason] += 1
