"""Ring attention: keys and values travel round the ranks while each computes with the ones it has.

Liu et al., arXiv 2310.01889; partial results are merged by their log-sum-exp (FlashAttention-2, arXiv 2307.08691).
In the backward pass the gradients of keys and values travel with them and arrive, complete, where they began.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mainspring.ops.precision import accumulator
from mainspring.parallel.collectives import Pending, pass_on
from mainspring.parallel.context import ContextBatch, Rectangle, rectangles
from mainspring.parallel.mesh import Group


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, batch: ContextBatch, group: Group, scale: float, window: int | None
) -> Tensor:
    """Causal attention over the whole stream. q: [T, Hq, D], k, v: [T, Hkv, D], the rank's tokens -> [T, Hq, D]."""
    plans = [
        rectangles(batch, group.rank, (group.rank - step) % group.size, group.size)
        for step in range(group.size)
    ]
    sizes = batch.sizes(group.size)
    out: Tensor = _Ring.apply(q, k, v, plans, sizes, group, scale, window)
    return out


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plans: list[list[Rectangle]],
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
        for step, plan in enumerate(plans):
            moving = _send_on(travelling, sizes, step, group)
            for part in plan:
                piece, piece_lse = attend_rectangle(q, travelling, part, scale, window)
                _merge(out, lse, piece, piece_lse, part)
            travelling = _arrived(moving, travelling)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plans, ctx.sizes, ctx.group, ctx.scale, ctx.window = plans, sizes, group, scale, window
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
        for step, plan in enumerate(ctx.plans):
            moving = _send_on(travelling, sizes, step, group)
            for part in plan:
                rectangle_gradient(
                    q, travelling, grad, lse, delta, part, ctx.scale, ctx.window, d_q, d_travelling
                )
            # The gradients follow a step behind their keys; the last hop brings them home.
            d_moving = _send_on(d_travelling, sizes, step, group, home=True)
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


def _merge(out: Tensor, lse: Tensor, piece: Tensor, piece_lse: Tensor, part: Rectangle) -> None:
    """Adds a rectangle's result to the rows' running one."""
    rows = slice(part.q0, part.q1)
    new = torch.logaddexp(lse[rows], piece_lse)
    safe = new.clamp_min(torch.finfo(new.dtype).min)  # a row that has seen nothing yet
    out[rows] = (
        out[rows] * torch.exp(lse[rows] - safe)[..., None] + piece * torch.exp(piece_lse - safe)[..., None]
    )
    lse[rows] = new
