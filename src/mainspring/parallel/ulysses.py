"""Ulysses: between projections and attention the ranks exchange tokens for heads (Jacobs et al., arXiv 2309.14509).

Each rank then has all tokens of the stream for its share of the heads, and attention is the ordinary one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mainspring import ops
from mainspring.ops import Policy
from mainspring.parallel.collectives import start_exchange
from mainspring.parallel.context import ContextBatch, pieces_of
from mainspring.parallel.mesh import Group


def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: ContextBatch,
    group: Group,
    *,
    layer: int,
    scale: float,
    window: int | None,
    policy: Policy,
) -> Tensor:
    """Causal attention over the whole stream. q: [T, Hq, D], k, v: [T, Hkv, D], the rank's tokens -> [T, Hq, D].

    Where there are fewer key heads than ranks each is sent to all the ranks whose query heads read it.
    """
    sizes = batch.sizes(group.size)
    copies = max(1, group.size // k.shape[1])
    k, v = (x.repeat_interleave(copies, dim=1) if copies > 1 else x for x in (k, v))
    order = stream_order(batch, group.size)
    q, k, v = (_heads_for_tokens(x, sizes, group)[order] for x in (q, k, v))
    out = ops.attention(q, k, v, batch.stream, layer=layer, scale=scale, window=window, policy=policy)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0], device=order.device)
    result: Tensor = _Exchange.apply(out[back], sizes, group, False)
    return result


def stream_order(batch: ContextBatch, cp: int) -> Tensor:
    """[T] int64: where each token of the stream is among the ranks' tokens, end to end."""
    place = torch.cat(
        [torch.arange(*batch.pieces[piece]) for rank in range(cp) for piece in pieces_of(rank, cp)]
    )
    order = torch.empty_like(place)
    order[place] = torch.arange(place.shape[0])
    return order.to(batch.positions.device)


def _heads_for_tokens(x: Tensor, sizes: list[int], group: Group) -> Tensor:
    result: Tensor = _Exchange.apply(x, sizes, group, True)
    return result


class _Exchange(torch.autograd.Function):
    """[own tokens, H, D] -> [all tokens, H / cp, D] (scatter), or back; each is the other's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], group: Group, scatter: bool) -> Tensor:
        ctx.sizes, ctx.group, ctx.scatter = sizes, group, scatter
        return _exchange(x, sizes, group, scatter)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _exchange(grad, ctx.sizes, ctx.group, not ctx.scatter), None, None, None


def _exchange(x: Tensor, sizes: list[int], group: Group, scatter: bool) -> Tensor:
    own, cp = sizes[group.rank], group.size
    if scatter:
        by_rank = x.unflatten(1, (cp, -1)).transpose(0, 1)  # [cp, own, H / cp, D]
        return start_exchange(by_rank.flatten(0, 1), [own] * cp, sizes, group).wait()
    received: Tensor = start_exchange(x, sizes, [own] * cp, group).wait()  # [cp · own, H / cp, D]
    merged: Tensor = received.unflatten(0, (cp, own)).transpose(0, 1).flatten(1, 2)
    return merged
