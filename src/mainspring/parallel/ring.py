"""Ring attention: keys and values travel round the ranks while each computes with the ones it has.

Liu et al., arXiv 2310.01889; partial results are merged by their log-sum-exp (FlashAttention-2, arXiv 2307.08691).
In the backward pass the gradients of keys and values travel with them and arrive, complete, where they began. Each
step is one call of the flash kernels for the documents inside a piece and one for rectangles between pieces; where a
sliding window cuts rectangles, which those kernels cannot say, each rectangle is computed by plain products.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from mainspring.ops.flash_attention import flash_attention_backward_op, flash_attention_op
from mainspring.ops.precision import accumulator
from mainspring.parallel.collectives import Pending, pass_on
from mainspring.parallel.context import ContextBatch, Rectangle, rectangles
from mainspring.parallel.mesh import Group


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, batch: ContextBatch, group: Group, scale: float, window: int | None
) -> Tensor:
    """Causal attention over the whole stream. q: [T, Hq, D], k, v: [T, Hkv, D], the rank's tokens -> [T, Hq, D]."""
    if "steps" not in batch.made:
        batch.made["steps"] = [
            _step(rectangles(batch, group.rank, (group.rank - step) % group.size, group.size), q.device)
            for step in range(group.size)
        ]
    steps: list[_Step] = batch.made["steps"]
    out: Tensor = _Ring.apply(q, k, v, steps, batch.sizes(group.size), group, scale, window)
    return out


@dataclass(frozen=True)
class _Call:
    """One call of the flash kernels. Rows `queries` of the rank's stream against rows `keys` of the travelling one;
    runs: its contiguous parts, as rows (in q, in k, in the call's q, in its k), to be merged one by one."""

    causal: bool
    queries: Tensor
    keys: Tensor
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    runs: list[tuple[slice, slice, slice, slice]]


@dataclass(frozen=True)
class _Step:
    """What a rank computes with the keys of one other."""

    rectangles: list[Rectangle]
    calls: list[_Call]


def _step(parts: list[Rectangle], device: torch.device) -> _Step:
    inside = [part for part in parts if part.ahead == 0]  # a document's part of one piece against itself
    between = [part for part in parts if part.ahead != 0]  # all seen
    calls = [_call(group, causal, device) for group, causal in ((inside, True), (between, False)) if group]
    return _Step(parts, calls)


def _call(parts: list[Rectangle], causal: bool, device: torch.device) -> _Call:
    q_sizes, k_sizes = [p.q1 - p.q0 for p in parts], [p.k1 - p.k0 for p in parts]
    cu_q, cu_k = list(accumulate(q_sizes, initial=0)), list(accumulate(k_sizes, initial=0))
    runs = [
        (slice(p.q0, p.q1), slice(p.k0, p.k1), slice(qa, qb), slice(ka, kb))
        for p, (qa, qb), (ka, kb) in zip(parts, pairwise(cu_q), pairwise(cu_k), strict=True)
    ]
    if causal:  # they lie end to end in both streams
        whole, alike = slice(parts[0].q0, parts[-1].q1), slice(parts[0].k0, parts[-1].k1)
        runs = [(whole, alike, slice(0, cu_q[-1]), slice(0, cu_k[-1]))]

    def boundaries(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return _Call(
        causal,
        torch.cat([torch.arange(p.q0, p.q1) for p in parts]).to(device),
        torch.cat([torch.arange(p.k0, p.k1) for p in parts]).to(device),
        boundaries(cu_q), boundaries(cu_k), max(q_sizes), max(k_sizes), runs,
    )  # fmt: skip


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        steps: list[_Step],
        sizes: list[int],
        group: Group,
        scale: float,
        window: int | None,
    ) -> Tensor:
        wide = accumulator(q.dtype)
        heads, dim = q.shape[1:]
        out = torch.zeros(q.shape[0], heads, dim, dtype=wide, device=q.device)
        lse = torch.full((q.shape[0], heads), -torch.inf, dtype=wide, device=q.device)
        travelling = torch.stack([k, v])  # [2, T, Hkv, D]
        for number, step in enumerate(steps):
            moving = _send_on(travelling, sizes, number, group)
            if window is None:
                for call in step.calls:
                    _attend(q, travelling, call, scale, out, lse)
            for part in step.rectangles if window is not None else ():
                piece, piece_lse = attend_rectangle(q, travelling, part, scale, window)
                _merge(out, lse, piece, piece_lse, slice(part.q0, part.q1))
            travelling = _arrived(moving, travelling)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.steps, ctx.sizes, ctx.group, ctx.scale, ctx.window = steps, sizes, group, scale, window
        return out.to(q.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        group, sizes = ctx.group, ctx.sizes
        grad = grad.to(out.dtype)
        delta = (grad * out).sum(-1)  # [T, Hq]
        d_q = torch.zeros_like(out)
        travelling = torch.stack([k, v])
        d_travelling = torch.zeros(travelling.shape, dtype=out.dtype, device=q.device)
        for number, step in enumerate(ctx.steps):
            moving = _send_on(travelling, sizes, number, group)
            if ctx.window is None:
                for call in step.calls:
                    _attend_backward(grad, q, travelling, out, lse, call, ctx.scale, d_q, d_travelling)
            for part in step.rectangles if ctx.window is not None else ():
                rectangle_gradient(
                    q, travelling, grad, lse, delta, part, ctx.scale, ctx.window, d_q, d_travelling
                )
            # The gradients follow a step behind their keys; the last hop brings them home.
            d_moving = _send_on(d_travelling, sizes, number, group, home=True)
            travelling = _arrived(moving, travelling)
            d_travelling = _arrived(d_moving, d_travelling)
        d_k, d_v = d_travelling.to(q.dtype)
        return d_q.to(q.dtype), d_k, d_v, None, None, None, None, None


def _send_on(
    x: Tensor, sizes: list[int], step: int, group: Group, *, home: bool = False
) -> tuple[Pending, Pending] | None:
    """Starts the hop after `step`; the last one is only taken by what must come home."""
    if group.size == 1 or (step == group.size - 1 and not home):
        return None
    coming = sizes[(group.rank - step - 1) % group.size]
    return pass_on(x, x.new_empty(x.shape[0], coming, *x.shape[2:]), group)


def _arrived(moving: tuple[Pending, Pending] | None, current: Tensor) -> Tensor:
    if moving is None:
        return current
    received, sent = moving
    sent.wait()
    return received.wait()


def _attend(q: Tensor, kv: Tensor, call: _Call, scale: float, out: Tensor, lse: Tensor) -> None:
    """Merges a call's result into out [T, Hq, D] and lse [T, Hq]."""
    keys, values = kv[:, call.keys].unbind(0)
    piece, piece_lse = flash_attention_op(
        q[call.queries], keys, values, call.cu_q, call.cu_k, call.max_q, call.max_k, scale, call.causal, 0, 0.0,
        True, None,
    )  # fmt: skip
    for rows, _, part, _ in call.runs:
        _merge(out, lse, piece[part].to(out.dtype), piece_lse[:, part].t().to(lse.dtype), rows)


def _attend_backward(
    grad: Tensor,
    q: Tensor,
    kv: Tensor,
    out: Tensor,
    lse: Tensor,
    call: _Call,
    scale: float,
    d_q: Tensor,
    d_kv: Tensor,
) -> None:
    """Adds a call's part of the gradients: with the whole row's result and lse the kernels give exactly that."""
    keys, values = kv[:, call.keys].unbind(0)
    rows = call.queries
    d_queries, d_keys, d_values = flash_attention_backward_op(
        grad[rows].to(q.dtype), q[rows], keys, values, out[rows].to(q.dtype), lse[rows].t().contiguous(),
        call.cu_q, call.cu_k, call.max_q, call.max_k, scale, call.causal, 0, 0.0, True, None,
    )  # fmt: skip
    for q_rows, k_rows, q_part, k_part in call.runs:
        d_q[q_rows] += d_queries[q_part]
        d_kv[0, k_rows] += d_keys[k_part]
        d_kv[1, k_rows] += d_values[k_part]


def attend_rectangle(
    q: Tensor, kv: Tensor, part: Rectangle, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """(softmax over the rectangle's keys alone [n, Hq, D], its log-sum-exp [n, Hq]); 0 and -inf where none is seen.

    q: [T, Hq, D], kv: [2, Tk, Hkv, D], of which the rectangle names rows.
    """
    scores, values = _scores(q, kv, part, scale, window)
    top = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    out = weights @ values / total.clamp_min(torch.finfo(scores.dtype).tiny)
    lse = (top + total.log())[..., 0]
    return out.flatten(0, 1).transpose(0, 1), lse.flatten(0, 1).transpose(0, 1)


def rectangle_gradient(
    q: Tensor,
    kv: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    part: Rectangle,
    scale: float,
    window: int | None,
    d_q: Tensor,
    d_kv: Tensor,
) -> None:
    """Adds the rectangle's part of the gradients, with the probabilities of the whole row (from lse)."""
    scores, values = _scores(q, kv, part, scale, window)
    kv_heads, group = scores.shape[:2]
    queries, keys = slice(part.q0, part.q1), slice(part.k0, part.k1)

    def by_head(x: Tensor) -> Tensor:  # [n, Hq, ...] -> [Hkv, G, n, ...]
        heads: Tensor = x[queries].transpose(0, 1).unflatten(0, (kv_heads, group))
        return heads

    p = torch.exp(scores - by_head(lse)[..., None])
    d_out = by_head(grad)
    d_kv[1, keys] += (p.transpose(-1, -2) @ d_out).sum(1).transpose(0, 1)
    d_scores = p * (d_out @ values.transpose(-1, -2) - by_head(delta)[..., None]) * scale
    wide_k = kv[0, keys].to(scores.dtype).transpose(0, 1)[:, None]
    d_q[queries] += (d_scores @ wide_k).flatten(0, 1).transpose(0, 1)
    d_kv[0, keys] += (d_scores.transpose(-1, -2) @ by_head(q.to(scores.dtype))).sum(1).transpose(0, 1)


def _scores(
    q: Tensor, kv: Tensor, part: Rectangle, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """(masked scores [Hkv, G, n, m], values [Hkv, 1, m, D]) in the accumulator's dtype."""
    wide = accumulator(q.dtype)
    kv_heads = kv.shape[2]
    queries = q[part.q0 : part.q1].to(wide).transpose(0, 1).unflatten(0, (kv_heads, -1))
    keys, values = kv[:, part.k0 : part.k1].to(wide).transpose(1, 2)[:, :, None].unbind(0)
    scores: Tensor = queries @ keys.transpose(-1, -2) * scale
    seen = part.mask(window, q.device)
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores, values


def _merge(out: Tensor, lse: Tensor, piece: Tensor, piece_lse: Tensor, rows: slice) -> None:
    """Adds a result over some keys to the rows' running one."""
    new = torch.logaddexp(lse[rows], piece_lse)
    safe = new.clamp_min(torch.finfo(new.dtype).min)  # a row that has seen nothing yet
    out[rows] = (
        out[rows] * torch.exp(lse[rows] - safe)[..., None] + piece * torch.exp(piece_lse - safe)[..., None]
    )
    lse[rows] = new
