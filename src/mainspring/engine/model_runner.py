"""Steps on the model: scheduled tokens in, sampled tokens out, launched without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mainspring.engine.decode_graphs import DecodeGraphs, DecodeRows
from mainspring.engine.hooks import Adapters, Sampler, SampleRows
from mainspring.engine.logprobs import LogprobTensors, compute_logprobs
from mainspring.engine.messages import TokenLogprobs
from mainspring.engine.request import Request
from mainspring.engine.scheduler import ScheduledRequest
from mainspring.engine.seats import SeatTables
from mainspring.engine.served_model import (
    ServedModel,
    allocate_cache,
    cache_shape,
    copy_cache_blocks,
    release_cache,
    watched,
)
from mainspring.engine.step_graphs import StepGraphs
from mainspring.engine.step_input import StepArrays, build_step, send
from mainspring.engine.threads import single_threaded
from mainspring.ops.batch import KVCache, LinearAdapters, TokenBatch
from mainspring.ops.cuda.ahead import build_for_serving
from mainspring.ops.decode_order import decode_lanes, decode_order
from mainspring.ops.logit_loss import rows_per_chunk


@dataclass(slots=True)
class StepResult:
    """A launched step. Its tensors are on the CPU, and complete once `wait` has returned.

    Attributes:
        scheduled: the requests of the step.
        tokens: [R] int64, of each sampling request 1 + num_drafts in order.
        logprobs: of the rows of `logprob_rows`, with as many alternatives as the greediest request wants.
        logprob_rows, logprob_counts: which of the R rows those are, and how many alternatives each wants.
        prompt_logprobs: (request, its log-probabilities) of the chunks of prompts that want them.
        embeddings: (request, [hidden] float32) of the pooled ones that are complete.
    """

    scheduled: Sequence[ScheduledRequest]
    tokens: Tensor | None = None
    logprobs: LogprobTensors | None = None
    logprob_rows: Sequence[int] = ()
    logprob_counts: Sequence[int] = ()
    prompt_logprobs: list[tuple[Request, LogprobTensors]] = field(default_factory=list)
    embeddings: list[tuple[Request, Tensor]] = field(default_factory=list)
    done: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Until the device has finished the step."""
        if self.done is not None:
            self.done.synchronize()

    def logprob_entries(self) -> dict[int, TokenLogprobs]:
        """By row of `tokens`, of the rows whose requests want them."""
        if self.logprobs is None:
            return {}
        entries = self.logprobs.entries(self.logprob_counts)
        return dict(zip(self.logprob_rows, entries, strict=True))


class ModelRunner:
    """Owns the KV cache's memory and the device's tables; which block belongs to whom is the scheduler's knowledge.

    A step is launched on the current stream. Requests are not advanced: after an error a step can be repeated.
    """

    def __init__(
        self,
        model: ServedModel,
        sampler: Sampler,
        *,
        num_blocks: int,
        block_size: int,
        num_seats: int,
        max_model_len: int,
        cache_dtype: torch.dtype,
        max_num_tokens: int,
        graphs: bool,
        logprobs_temperature: float = 1.0,
    ) -> None:
        """max_num_tokens: of a step. graphs: run steps of fixed sizes; on a GPU, from CUDA graphs."""
        self._model = model
        self._sampler = sampler
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._cache_dtype = cache_dtype
        self._tables = SeatTables(num_seats, max_model_len, block_size, model.device)
        self._max_model_len = max_model_len
        self._max_num_tokens = max_num_tokens
        self._wants_graphs = graphs
        self._logprobs_temperature = logprobs_temperature
        self._decode_lanes = decode_lanes(cache_shape(model).num_kv_heads, model.device)
        self._cache: KVCache | None = None
        self._graphs: DecodeGraphs | None = None
        self._step_graphs: StepGraphs | None = None
        self.adapters: Adapters | None = None
        if model.device.type == "cuda":
            heads = model.config.head_dim, model.dtype, cache_dtype
            build_for_serving(*heads, model.config.sliding_windows, model.policy)
        self.allocate_cache()

    def allocate_cache(self) -> None:
        """Take the cache's memory, if it is not held."""
        with watched(self._model):
            self._allocate_cache()

    def _allocate_cache(self) -> None:
        if self._cache is None:
            self._cache = allocate_cache(self._model, self._num_blocks, self._block_size, self._cache_dtype)
            if self._wants_graphs:
                self._graphs = DecodeGraphs(
                    self._model, self._tables, self._sampler, self._cache, self._max_model_len
                )
                if StepGraphs.serves(self._model, self._cache):
                    self._step_graphs = StepGraphs(
                        self._model,
                        self._tables,
                        self._sampler,
                        self._cache,
                        self._max_model_len,
                        self._max_num_tokens,
                        self._graphs,
                    )

    @property
    def has_cache(self) -> bool:
        return self._cache is not None

    @property
    def cache_bytes(self) -> int:
        """What keys and values take in one process, the null block included."""
        shape = cache_shape(self._model)
        row = shape.row_bytes(self._cache_dtype.itemsize)
        return 2 * shape.num_layers * (self._num_blocks + 1) * self._block_size * row

    @property
    def cache_dtype_name(self) -> str:
        return str(self._cache_dtype).removeprefix("torch.")

    def rope_depends_on_length(self, rope_length: int) -> bool:
        """A sequence that can become so long has a RoPE base of its own."""
        scaling = self._model.config.rope_scaling
        is_dynamic = scaling is not None and scaling.kind == "dynamic"
        return is_dynamic and rope_length > self._model.config.max_position_embeddings

    def free_cache(self) -> None:
        """Give the cache's memory back."""
        self._graphs = None
        self._step_graphs = None
        self._cache = None
        release_cache(self._model)
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()  # also for other processes

    def launch(
        self, scheduled: Sequence[ScheduledRequest], block_copies: Sequence[tuple[int, int]] = ()
    ) -> StepResult:
        """Compute the scheduled tokens, write their keys and values, sample what follows them.

        block_copies: contents of blocks to copy first, (from, to).
        """
        assert self._cache is not None  # the core does not step while it sleeps
        self._copy_blocks(block_copies)
        for item in scheduled:
            if not item.request.is_seated:
                self._sampler.take_seat(item.request.seat, item.request)
        if self._graphs is not None and all(self._fits_graph(item) for item in scheduled):
            result = StepResult(self._in_turn(scheduled))
            self._decode(self._graphs, result)
        else:
            result = StepResult(scheduled)
            self._compute(result)
        if self._model.device.type == "cuda":
            result.done = torch.cuda.Event()
            result.done.record()
        return result

    def _in_turn(self, scheduled: Sequence[ScheduledRequest]) -> Sequence[ScheduledRequest]:
        """The requests of a decode step in the order in which the device reads their keys soonest."""
        if not 0 < self._decode_lanes < len(scheduled):
            return scheduled
        contexts = np.fromiter((item.start + 1 for item in scheduled), dtype=np.int64, count=len(scheduled))
        return [scheduled[place] for place in decode_order(contexts, self._decode_lanes).tolist()]

    def _fits_graph(self, item: ScheduledRequest) -> bool:
        """One token is to be computed and another sampled, of a request of which the device knows the rest."""
        request = item.request
        return (
            item.num_tokens == 1
            and item.samples
            and request.is_seated
            and len(request.block_table) - request.num_blocks_uploaded <= 1
            and self._is_simple(item)
        )

    def _is_simple(self, item: ScheduledRequest) -> bool:
        """Its tokens take the path that all graphs take, and nobody asks for their hidden states."""
        request = item.request
        return (
            not request.lora_id
            and request.pooling is None
            and not (request.prompt_logprobs is not None and request.needs_all_hidden_states)
            and not self.rope_depends_on_length(request.rope_length)
        )

    def _decode(self, graphs: DecodeGraphs, result: StepResult) -> None:
        size = self._block_size
        rows = [
            (item.request.seat, item.start, item.request.block_table[item.start // size])
            for item in result.scheduled
        ]
        self._sample_after_graph(result, graphs.run(np.array(rows, dtype=np.int64).T))

    def _sample_after_graph(self, result: StepResult, rows: DecodeRows) -> None:
        """The graph has sampled as if all requests were plain."""
        is_plain = all(self._sampler.is_plain(item.request) for item in result.scheduled if item.samples)
        self._sample(result, rows.logits, rows.seats, rows.positions, rows.tokens if is_plain else None)

    def _compute(self, result: StepResult) -> None:
        """A step of any kind."""
        scheduled = result.scheduled
        step = build_step(scheduled)
        self._enter_news(step)
        graphs = self._step_graphs
        size = graphs.size_of(step) if graphs is not None and all(map(self._is_simple, scheduled)) else None
        if graphs is not None and size is not None:
            rows = graphs.run(step, size)
            if len(step.sample_rows):
                self._sample_after_graph(result, rows)
            return
        sample_rows, sample_seats, sample_positions, hidden = self._forward(scheduled, step)
        result.prompt_logprobs = self._prompt_logprobs(scheduled, hidden)
        result.embeddings = _pool(scheduled, hidden)
        if len(sample_rows):
            everything = len(sample_rows) == len(hidden)
            logits = self._model.logits(hidden if everything else hidden.index_select(0, sample_rows))
            self._sample(result, logits, sample_seats, sample_positions, None)

    def _enter_news(self, step: StepArrays) -> None:
        """Tell the device's tables which tokens and blocks are new."""
        if step.new_tokens.size or step.new_blocks.size:
            tokens, blocks = send(step.news(), self._model.device)
            if tokens.shape[1]:
                self._tables.write_tokens(*tokens)
            if blocks.shape[1]:
                self._tables.write_blocks(*blocks)

    def _forward(
        self, scheduled: Sequence[ScheduledRequest], step: StepArrays
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(rows, seats and positions of what is to be sampled, [R] each, hidden states of all tokens)."""
        tables = self._tables
        token_seats, positions, seats, context_lens, boundaries, *samples = send(
            step.rest(), self._model.device
        )
        contexts = tuple(item.start + item.num_tokens for item in scheduled)
        batch = TokenBatch(
            positions=positions,
            cu_seqlens=boundaries.to(torch.int32),
            context_lens=context_lens.to(torch.int32),
            lengths=tuple(item.num_tokens for item in scheduled),
            contexts=contexts,
            rope_lengths=tuple(item.request.rope_length for item in scheduled),
            cache=self._cache,
            slots=tables.slots(token_seats, positions),
            block_tables=tables.block_tables(seats, -(-max(contexts) // self._block_size)),
            adapters=self._adapters_of(scheduled),
        )
        hidden: Tensor = self._model(tables.read_tokens(token_seats, positions), batch)
        sample_rows, sample_seats, sample_positions = samples
        return sample_rows, sample_seats, sample_positions, hidden

    def _adapters_of(self, scheduled: Sequence[ScheduledRequest]) -> LinearAdapters | None:
        if self.adapters is None or not any(item.request.lora_id for item in scheduled):
            return None
        ids = [item.request.lora_id for item in scheduled]
        lengths = [item.num_tokens for item in scheduled]
        return self.adapters.of_batch(send([np.repeat(ids, lengths)], self._model.device)[0])

    def _sample(
        self, result: StepResult, logits: Tensor, seats: Tensor, positions: Tensor, tokens: Tensor | None
    ) -> None:
        """Sample (unless the tokens are there already), tell the device's tables, and send all to the host."""
        samplers = [item for item in result.scheduled if item.samples]
        requests = [item.request for item in samplers for _ in range(1 + item.num_drafts)]
        on_cpu = logits.device.type == "cpu"
        with single_threaded(on_cpu):
            if tokens is None:
                if all(self._sampler.is_plain(request) for request in requests):
                    tokens = self._sampler.sample_plain(logits, seats, positions)
                else:
                    offsets = [offset for item in samplers for offset in range(1 + item.num_drafts)]
                    rows = SampleRows(requests, offsets, seats, positions, self._bitmask(requests))
                    tokens = self._sampler.sample(logits, rows)
                self._tables.write_tokens(seats, positions, tokens)
            # A copy: the next step may overwrite what a graph gave.
            result.tokens = tokens.clone() if on_cpu else tokens.to("cpu", non_blocking=True)
            wanted = [row for row, request in enumerate(requests) if request.params.logprobs is not None]
            if wanted:
                result.logprob_rows = wanted
                if len(wanted) < len(requests):
                    index = self._send(wanted)
                    logits, tokens = logits.index_select(0, index), tokens.index_select(0, index)
                result.logprob_counts = [requests[row].params.logprobs or 0 for row in wanted]
                most = max(result.logprob_counts)
                result.logprobs = self._logprobs(logits, tokens, most).to_host()

    def _prompt_logprobs(
        self, scheduled: Sequence[ScheduledRequest], hidden: Tensor
    ) -> list[tuple[Request, LogprobTensors]]:
        """The row of prompt token i predicts prompt token i + 1. A recomputed row is not reported again."""
        results = []
        offset = 0
        for item in scheduled:
            request, known = item.request, item.request.num_prompt_logprobs
            start = offset - item.start
            offset += item.num_tokens
            if request.prompt_logprobs is None or known == request.num_prompt:
                continue
            end = min(item.start + item.num_tokens + 1, request.num_prompt)
            num_top = request.params.prompt_logprobs or 0
            step = rows_per_chunk(self._model.config.vocab_size)
            for first in range(known, end, step):
                targets = self._send(request.token_ids[first : min(first + step, end)])
                rows = hidden[start + first - 1 : start + first - 1 + len(targets)]
                logprobs = self._logprobs(self._model.logits(rows), targets, num_top)
                results.append((request, logprobs.to_host()))
        return results

    def _logprobs(self, logits: Tensor, tokens: Tensor, num_top: int) -> LogprobTensors:
        return compute_logprobs(logits, tokens, num_top, self._model.policy, self._logprobs_temperature)

    def _copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        if copies:
            assert self._cache is not None
            copy_cache_blocks(self._model, self._cache, self._send(copies))

    def _bitmask(self, requests: Sequence[Request]) -> Tensor | None:
        """[R, ceil(V / 32)] int32 of what the requests' grammars allow; None if none has one."""
        if all(request.grammar is None for request in requests):
            return None
        device = self._model.device
        words = -(-self._model.config.vocab_size // 32)
        mask = torch.full((len(requests), words), -1, dtype=torch.int32, pin_memory=device.type == "cuda")
        for row, request in enumerate(requests):
            if request.grammar is not None:
                request.grammar.fill_bitmask(mask, row)
        return mask.to(device, non_blocking=True)

    def _send(self, values: Sequence[int] | Sequence[tuple[int, int]]) -> Tensor:
        return send([np.array(values, dtype=np.int64)], self._model.device)[0]


def _pool(scheduled: Sequence[ScheduledRequest], hidden: Tensor) -> list[tuple[Request, Tensor]]:
    """[hidden] float32 for each request whose prompt is complete: of its last token, or the mean of all."""
    results = []
    offset = 0
    for item in scheduled:
        request = item.request
        offset += item.num_tokens
        if request.pooling is None:
            continue
        chunk = hidden[offset - item.num_tokens : offset]
        complete = item.start + item.num_tokens == request.num_prompt
        if request.pooling == "mean":
            # A chunk that is computed again (after an error or a preemption) takes the place of the old one.
            kept = [(start, rows) for start, rows in request.hidden_chunks if start < item.start]
            request.hidden_chunks = [*kept, (item.start, chunk)]
            if complete:
                # In one sum over all rows, so that the result does not depend on the chunks.
                whole = torch.cat([rows for _, rows in request.hidden_chunks])
                results.append((request, whole.float().mean(dim=0).to("cpu", non_blocking=True)))
        elif complete:
            results.append((request, chunk[-1].float().to("cpu", non_blocking=True)))
    return results
