"""One step on the model: the scheduled tokens in, logits out for the rows that need them and no others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mainspring.engine.logprobs import report_logprobs
from mainspring.engine.messages import TokenLogprobs
from mainspring.engine.request import Request
from mainspring.engine.scheduler import ScheduledRequest
from mainspring.model.decoder import Decoder
from mainspring.ops.batch import KVCache, TokenBatch
from mainspring.ops.log_probs import rows_per_chunk


class ModelRunner:
    """Owns the KV cache's memory; which block belongs to whom is the scheduler's knowledge."""

    def __init__(self, model: Decoder, num_blocks: int, block_size: int) -> None:
        config = model.config
        self._model = model
        self._cache = KVCache.allocate(
            config.num_layers,
            num_blocks + 1,  # the null block
            block_size,
            config.num_kv_heads,
            config.head_dim,
            model.dtype,
            model.device,
        )

    def run(self, scheduled: Sequence[ScheduledRequest]) -> Tensor | None:
        """Compute the scheduled tokens, write their keys and values, add to `prompt_logprobs` where asked.

        Returns logits [N, V] float32, one row for each of the N scheduled requests with `samples`, in
        order; None if there is none. Requests are not advanced: after an error the step can be repeated.
        """
        tokens: list[int] = []
        lengths: list[int] = []
        contexts: list[int] = []
        last_rows: list[int] = []
        for item in scheduled:
            request = item.request
            end = request.num_computed + item.num_tokens
            if item.num_tokens == 1:
                tokens.append(request.token_ids[end - 1])
            else:
                tokens.extend(request.token_ids[request.num_computed : end])
            lengths.append(item.num_tokens)
            contexts.append(end)
            if item.samples:
                last_rows.append(len(tokens) - 1)
        batch = TokenBatch.paged(
            lengths,
            contexts,
            [item.request.block_table for item in scheduled],
            self._cache,
            rope_lengths=[item.request.rope_length for item in scheduled],
        )
        hidden = self._model(torch.tensor(tokens, dtype=torch.int64, device=self._model.device), batch)
        self._collect_prompt_logprobs(scheduled, hidden)
        if not last_rows:
            return None
        if len(last_rows) < len(tokens):
            hidden = hidden[last_rows]
        return self._model.logits(hidden)

    def sampled_logprobs(
        self, logits: Tensor, token_ids: Sequence[int], requests: Sequence[Request]
    ) -> list[TokenLogprobs | None]:
        """For each row of logits [N, V] and its sampled token: the log-probabilities its request asks for."""
        rows = [row for row, request in enumerate(requests) if request.params.logprobs is not None]
        result: list[TokenLogprobs | None] = [None] * len(requests)
        if not rows:
            return result
        entries = report_logprobs(
            logits if len(rows) == len(requests) else logits[rows],
            [token_ids[row] for row in rows],
            [requests[row].params.logprobs or 0 for row in rows],
            self._model.policy,
        )
        for row, entry in zip(rows, entries, strict=True):
            result[row] = entry
        return result

    def _collect_prompt_logprobs(self, scheduled: Sequence[ScheduledRequest], hidden: Tensor) -> None:
        """The row of prompt token i predicts prompt token i + 1. A recomputed row is not reported again."""
        offset = 0
        for item in scheduled:
            request, known = item.request, item.request.prompt_logprobs
            start = offset - request.num_computed
            offset += item.num_tokens
            if known is None or len(known) == request.num_prompt:
                continue
            end = min(request.num_computed + item.num_tokens + 1, request.num_prompt)
            num_top = request.params.prompt_logprobs or 0
            step = rows_per_chunk(self._model.config.vocab_size)
            for first in range(len(known), end, step):
                targets = request.token_ids[first : min(first + step, end)]
                rows = hidden[start + first - 1 : start + first - 1 + len(targets)]
                known.extend(
                    report_logprobs(
                        self._model.logits(rows), targets, [num_top] * len(targets), self._model.policy
                    )
                )
