"""Attention for training on a CPU: batched matrix products over sequences of like length, backward by hand.

PyTorch's fused CPU attention spends most of a training step's attention time in its backward pass (in
bfloat16, twice what these products take). Scores of a bucket are materialised, [sequences · heads, L, L]: for
sequences of at most MAX_LENGTH tokens that stays below heads · MAX_LENGTH elements a token.
"""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

MAX_LENGTH = 1024
_ROUND = 64  # lengths are padded up to a multiple: few buckets, and little waste


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float, window: int | None
) -> Tensor:
    """Causal attention within each sequence. q: [T, Hq, D], k, v: [T, Hkv, D] -> [T, Hq, D]; differentiable once."""
    result: Tensor = _PackedAttention.apply(q, k, v, lengths, scale, window)
    return result


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float, window: int | None
    ) -> Tensor:
        group = q.shape[1] // k.shape[1]
        out = torch.empty(q.shape, dtype=q.dtype)
        saved = []
        for rows, padding in _buckets(lengths):
            queries, keys, values = (_gather(x, rows, g) for x, g in ((q, 1), (k, group), (v, group)))
            length = rows.shape[1]
            mask = _mask(length, window, q.dtype)
            # A padded key follows every real query, so causality hides it; padded queries are dropped.
            weights = torch.softmax(torch.baddbmm(mask, queries, keys.transpose(1, 2), alpha=scale), dim=-1)
            _scatter(torch.bmm(weights, values), out, rows, padding)
            saved += [queries, keys, values, weights]
        ctx.save_for_backward(*saved)
        ctx.lengths, ctx.scale, ctx.kv_heads = lengths, scale, k.shape[1]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        total, heads, dim = grad.shape
        dq = torch.empty(total, heads, dim, dtype=grad.dtype)
        dk = torch.empty(total, ctx.kv_heads, dim, dtype=grad.dtype)
        dv = torch.empty_like(dk)
        tensors = iter(ctx.saved_tensors)
        for rows, padding in _buckets(ctx.lengths):
            queries, keys, values, weights = (next(tensors) for _ in range(4))
            d_out = _gather(grad, rows, 1)
            if padding is not None:
                d_out.unflatten(0, (rows.shape[0], heads)).masked_fill_(padding[:, None, :, None], 0.0)
            _scatter(torch.bmm(weights.transpose(1, 2), d_out), dv, rows, padding)
            d_weights = torch.bmm(d_out, values.transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype).mul_(ctx.scale)
            _scatter(torch.bmm(d_scores, keys), dq, rows, padding)
            _scatter(torch.bmm(d_scores.transpose(1, 2), queries), dk, rows, padding)
        return dq, dk, dv, None, None, None


@lru_cache(maxsize=8)
def _buckets(lengths: tuple[int, ...]) -> tuple[tuple[Tensor, Tensor | None], ...]:
    """(rows [S, L] of the stream, padding [S, L] or None) of each group of sequences with like lengths."""
    members: dict[int, list[tuple[int, int]]] = defaultdict(list)
    start = 0
    for n in lengths:
        members[-(-n // _ROUND) * _ROUND].append((start, n))
        start += n
    buckets = []
    for width, group in members.items():
        width = max(n for _, n in group)
        starts, counts = (torch.tensor(column)[:, None] for column in zip(*group, strict=True))
        columns = torch.arange(width)[None, :]
        padding = columns >= counts
        rows = starts + torch.minimum(columns, counts - 1)
        buckets.append((rows, padding if bool(padding.any()) else None))
    return tuple(buckets)


def _gather(x: Tensor, rows: Tensor, repeat: int) -> Tensor:
    """[T, H, D] -> [S · H · repeat, L, D], contiguous."""
    sequences, length = rows.shape
    picked: Tensor = x.index_select(0, rows.flatten()).unflatten(0, (sequences, length)).transpose(1, 2)
    if repeat > 1:
        picked = picked.repeat_interleave(repeat, dim=1)
    return picked.reshape(-1, length, x.shape[2])


def _scatter(bucket: Tensor, out: Tensor, rows: Tensor, padding: Tensor | None) -> None:
    """[S · H', L, D] into [T, H, D]; heads that shared a key head are summed."""
    split = bucket.unflatten(0, (rows.shape[0], out.shape[1], -1))  # [S, H, repeat, L, D]
    merged = (split[:, :, 0] if split.shape[2] == 1 else split.sum(2)).transpose(1, 2)
    if padding is None:
        out.index_copy_(0, rows.flatten(), merged.reshape(-1, *out.shape[1:]))
    else:
        kept = ~padding
        out.index_copy_(0, rows[kept], merged[kept])


@lru_cache(maxsize=32)
def _mask(length: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """[L, L]: 0 where a query (row) sees a key, -inf elsewhere."""
    mask = torch.full((length, length), -torch.inf).triu(1)
    if window is not None:
        mask += torch.full((length, length), -torch.inf).tril(-window)
    return mask.to(dtype)
