"""From logits to tokens, each row on its own.

Every operation here treats a row by that row's data alone, in an order fixed by the vocabulary's size, so
that a row's token is the same in any batch. Sums run as `cumsum` (sequential by row) for that reason: `sum`
splits a lone long row over threads and several rows not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mainspring.engine.random_numbers import uniform
from mainspring.engine.request import Request

# Candidates looked at where top_p alone limits them, until the mass is reached; beyond these all are sorted.
_FIRST_WIDTH = 128
_SECOND_WIDTH = 1024


def sample(logits: Tensor, requests: Sequence[Request]) -> list[int]:
    """The next token of each request. logits: [N, V] float32, left unchanged."""
    if any(request.forbids_stopping for request in requests):
        logits = _without_stop_tokens(logits, requests)
    random_rows = [row for row, request in enumerate(requests) if not request.params.greedy]
    if not random_rows:
        return _argmax(logits)
    tokens = _argmax(logits) if len(random_rows) < len(requests) else [0] * len(requests)
    # On a CPU one row at a time stays in the cache: 0.2 ms a row of 49,152 against 0.6 for eight together.
    step = 1 if logits.device.type == "cpu" else len(random_rows)
    for first in range(0, len(random_rows), step):
        rows = random_rows[first : first + step]
        drawn = _sample_random(logits[rows], [requests[row] for row in rows])
        for row, token in zip(rows, drawn, strict=True):
            tokens[row] = token
    return tokens


def _argmax(logits: Tensor) -> list[int]:
    """The first of the largest, by row."""
    # NumPy's takes a tenth of the time of torch's on a CPU, and wakes no threads.
    indices = logits.numpy().argmax(axis=-1) if logits.device.type == "cpu" else logits.argmax(dim=-1)
    tokens: list[int] = indices.tolist()
    return tokens


def _without_stop_tokens(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    masked = logits.clone()
    for row, request in enumerate(requests):
        if request.forbids_stopping:
            # A tokenizer may name an end token that this model has no logit for.
            known = [token for token in request.ignored_stop_ids if token < logits.shape[1]]
            masked[row, known] = -torch.inf
    return masked


def _sample_random(logits: Tensor, requests: Sequence[Request]) -> list[int]:
    """Inverse transform sampling: the first token whose cumulative probability passes the random number."""
    device = logits.device
    params = [request.params for request in requests]
    # Below the smallest normal float32 a temperature would round to 0 and 0 / 0 follow.
    temperatures = [max(p.temperature, torch.finfo(torch.float32).tiny) for p in params]
    # With the maximum at 0, a small temperature sends the others to -inf instead of overflowing.
    scaled = logits - logits.amax(dim=-1, keepdim=True)
    scaled /= torch.tensor(temperatures, dtype=torch.float32, device=device)[:, None]
    probs = torch.softmax(scaled, dim=-1)  # [R, V]
    if any(p.min_p > 0.0 for p in params):
        min_p = torch.tensor([p.min_p for p in params], dtype=torch.float32, device=device)[:, None]
        probs = probs.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), 0.0)
    vocab_size = probs.shape[1]
    if any(0 < p.top_k < vocab_size or p.top_p < 1.0 for p in params):
        top_ks = [p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params]
        cutoffs = _cutoffs(probs, top_ks, [p.top_p for p in params])
        probs = probs.masked_fill(probs < cutoffs[:, None], 0.0)
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)  # [R, V]
    numbers = [uniform(request.random_key, request.num_generated) for request in requests]
    targets = torch.tensor(numbers, dtype=torch.float64, device=device)[:, None] * cumulative[:, -1:]
    # right=True: strictly above the target, so a token of probability 0 is never taken.
    drawn: list[int] = torch.searchsorted(cumulative, targets, right=True)[:, 0].tolist()
    return drawn


def _cutoffs(probs: Tensor, top_ks: Sequence[int], top_ps: Sequence[float]) -> Tensor:
    """The smallest probability that top-k and then top-p (of what top-k left, renormalised) keep, by row.

    A threshold and not a set of tokens: equal probabilities share their fate, so that the order in which a
    sort leaves them does not matter.

    probs: [R, V] float32, top_ks: 1 .. V -> [R] float32
    """
    device = probs.device
    vocab_size = probs.shape[1]
    limited = [k for k in top_ks if k < vocab_size]
    needs_mass = any(k == vocab_size and p < 1.0 for k, p in zip(top_ks, top_ps, strict=True))
    width = min(vocab_size, max([_FIRST_WIDTH if needs_mass else 1, *limited]))
    k_column = torch.tensor(top_ks, device=device)[:, None]
    p_column = torch.tensor(top_ps, dtype=torch.float64, device=device)[:, None]
    whole = probs.cumsum(dim=-1, dtype=torch.float64)[:, -1:] if needs_mass else None
    while True:
        top = _largest(probs, width)  # [R, W]
        kept = torch.where(torch.arange(width, device=device) < k_column, top, 0.0)
        mass = kept.cumsum(dim=-1, dtype=torch.float64)  # [R, W]
        total = mass[:, -1:] if whole is None else torch.where(k_column < vocab_size, mass[:, -1:], whole)
        wanted = p_column * total
        if whole is None or width == vocab_size:
            break
        if bool(((mass[:, -1:] >= wanted) | (p_column == 1.0) | (k_column < vocab_size)).all()):
            break
        width = min(vocab_size, _SECOND_WIDTH) if width < _SECOND_WIDTH else vocab_size
    # A token stays if what stands before it has not reached the mass yet; the first always stays.
    num_kept = ((mass - kept) < wanted).sum(dim=-1, keepdim=True).clamp_(min=1)  # [R, 1]
    num_kept = torch.minimum(num_kept, k_column.clamp(max=width))
    cutoffs = top.gather(1, num_kept - 1)[:, 0]
    unlimited = torch.tensor(
        [k == vocab_size and p == 1.0 for k, p in zip(top_ks, top_ps, strict=True)], device=device
    )
    return cutoffs.masked_fill_(unlimited, 0.0)


def _largest(probs: Tensor, width: int) -> Tensor:
    """The `width` largest of each row, descending: [R, V] -> [R, width]."""
    if width == probs.shape[1] and probs.device.type == "cpu":
        # NumPy's vectorised sort takes a quarter of the time of torch's.
        return torch.from_numpy(np.sort(probs.numpy(), axis=-1)).flip(-1)
    return probs.topk(width, dim=-1).values
