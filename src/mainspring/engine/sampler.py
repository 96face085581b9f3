"""The engine's sampler: each request's parameters in tensors by seat, and a step's logits turned into tokens.

Nothing here waits for the device. What changes from token to token (how often a token stands in the text) is counted
on the device itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mainspring import ops
from mainspring.engine.hooks import SampleRows
from mainspring.engine.request import Request
from mainspring.engine.step_input import send
from mainspring.ops import SamplingTensors
from mainspring.ops.sampling_tensors import ROW_WORDS


class SeatSampler:
    """Implements `hooks.Sampler`.

    Invariants: a seat's row of `_params` is its request's from `take_seat` on; its rows of `_history` and `_bias` are
    if the request is penalised or biased, and are not read otherwise. Both tensors exist from the first request on
    that needs them, so that an engine without any holds no memory for them ([S, V] of 32 bits each).
    """

    def __init__(self, num_seats: int, vocab_size: int, device: torch.device) -> None:
        """num_seats: one more is kept, for the padding rows of CUDA graphs: it is greedy."""
        self._device = device
        self._shape = (num_seats + 1, vocab_size)
        self._params = SamplingTensors.allocate(num_seats + 1, device)
        self._history: Tensor | None = None  # [S, V] int32, see `ops.adjust_logits`
        self._bias: Tensor | None = None  # [S, V] float32

    def take_seat(self, seat: int, request: Request) -> None:
        """See `hooks.Sampler.take_seat`."""
        row = torch.empty((1, ROW_WORDS), dtype=torch.int64, pin_memory=self._device.type == "cuda")
        _write_params(SamplingTensors.over(row), request)
        self._params.rows[seat].copy_(row[0], non_blocking=True)
        if request.params.penalised:
            self._count_all(seat, request)
        if _is_biased(request):
            self._set_bias(seat, request)

    def is_plain(self, request: Request) -> bool:
        """See `hooks.Sampler.is_plain`: greedy or by temperature, from the logits as they are.

        Truncation is left to `sample`: its launches cost something also where no row truncates.
        """
        adjusted = request.params.penalised or _is_biased(request) or request.grammar is not None
        return not adjusted and not request.forbids_stopping and not truncates(request)

    def sample_plain(self, logits: Tensor, seats: Tensor, positions: Tensor) -> Tensor:
        """See `hooks.Sampler.sample_plain`."""
        return self.draw(logits, seats, positions, truncate=False)

    def draw(self, logits: Tensor, seats: Tensor, positions: Tensor, *, truncate: bool) -> Tensor:
        """Tokens by the seats' parameters, from logits [R, V] as they are -> [R] int64, all on the device."""
        return ops.sample(logits, self._params, seats, positions, truncate=truncate)

    def sample(self, logits: Tensor, rows: SampleRows) -> Tensor:
        """See `hooks.Sampler.sample`."""
        penalised = any(request.params.penalised for request in rows.requests)
        biased = any(_is_biased(request) for request in rows.requests)
        ends = self._forbidden_ends(rows)
        if penalised or biased or ends or rows.bitmask is not None:
            logits = ops.adjust_logits(
                logits,
                self._params,
                rows.seats,
                history=self._history if penalised else None,
                bias=self._bias if biased else None,
                bitmask=rows.bitmask,
            )
        if ends:
            [places] = self._send(ends)
            logits.view(-1).index_fill_(0, places, -torch.inf)
        truncate = any(truncates(request) for request in rows.requests)
        tokens = self.draw(logits, rows.seats, rows.positions, truncate=truncate)
        if penalised and self._history is not None:
            # Rows of seats without penalties are counted too, and never read.
            places = rows.seats * self._shape[1] + tokens
            self._history.view(-1).index_add_(0, places, torch.full_like(places, 2, dtype=torch.int32))
        return tokens

    def _count_all(self, seat: int, request: Request) -> None:
        """The request sits down: count the tokens it has."""
        if self._history is None:
            self._history = torch.zeros(self._shape, dtype=torch.int32, device=self._device)
        row = self._history[seat].zero_()
        prompt, generated = self._send(
            np.unique(request.token_ids[: request.num_prompt]), request.token_ids[request.num_prompt :]
        )
        row.index_fill_(0, prompt, 1)
        row.index_add_(0, generated, torch.full_like(generated, 2, dtype=torch.int32))

    def _set_bias(self, seat: int, request: Request) -> None:
        if self._bias is None:
            self._bias = torch.zeros(self._shape, dtype=torch.float32, device=self._device)
        row = self._bias[seat]
        if request.params.allowed_token_ids is None:
            row.zero_()
        else:
            [allowed] = self._send(request.params.allowed_token_ids)
            row.fill_(-torch.inf).index_fill_(0, allowed, 0.0)
        biases = request.params.logit_bias or {}
        if biases:
            tokens, words = self._send(list(biases), np.array(list(biases.values()), dtype=np.float64))
            row.index_add_(0, tokens, words.view(torch.float64).to(torch.float32))

    def _forbidden_ends(self, rows: SampleRows) -> list[int]:
        """Where in [R, V] the tokens lie that end a request, of those that must not end yet."""
        vocab_size = self._shape[1]
        return [
            row * vocab_size + token
            for row, (request, offset) in enumerate(zip(rows.requests, rows.offsets, strict=True))
            if request.num_generated + offset < request.params.min_tokens
            for token in request.ignored_stop_ids
            # A tokenizer may name an end token that this model has no logit for.
            if token < vocab_size
        ]

    def _send(self, *values: Sequence[int] | npt.NDArray[Any]) -> list[Tensor]:
        """Lists of integers, or of float64 whose bits travel as int64."""
        arrays = [np.asarray(value) for value in values]
        words = [a.view(np.int64) if a.dtype == np.float64 and a.size else a.astype(np.int64) for a in arrays]
        return send(words, self._device)


def _is_biased(request: Request) -> bool:
    return bool(request.params.logit_bias) or request.params.allowed_token_ids is not None


def truncates(request: Request) -> bool:
    """The request has a top_k, a top_p or a min_p that matters."""
    params = request.params
    return not params.greedy and (params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0)


def _write_params(tensors: SamplingTensors, request: Request) -> None:
    params = request.params
    key = request.random_key
    tensors.rows.zero_()
    tensors.key[0] = key - (1 << 64) if key >= 1 << 63 else key
    tensors.temperature[0] = 0.0 if params.greedy else params.temperature  # top_k = 1 needs no search
    tensors.top_p[0] = params.top_p
    tensors.min_p[0] = params.min_p
    tensors.top_k[0] = min(max(params.top_k, 0), 2**31 - 1)
    tensors.repetition[0] = params.repetition_penalty
    tensors.presence[0] = params.presence_penalty
    tensors.frequency[0] = params.frequency_penalty
    tensors.biased[0] = _is_biased(request)
