"""Context parallelism: how a packed stream is cut over ranks so that each has as much attention to compute.

The stream is cut into 2 · cp contiguous pieces; rank r holds pieces r and 2 · cp - 1 - r (zig-zag, as in Llama 3,
arXiv 2407.21783, section 3.3.2, and Megatron-LM): under a causal mask an early piece is cheap and a late one dear.
Documents go on across pieces. A piece sees another one only through the document that reaches from one to the
other, of which there is at most one, so attention between pieces is a list of rectangles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from mainspring.ops import TokenBatch
from mainspring.parallel.collectives import all_reduce
from mainspring.parallel.mesh import Group, even_bounds


@dataclass(frozen=True)
class Rectangle:
    """Queries q0:q1 of a rank's stream against keys k0:k1 of another's. Key j is seen from query i if
    j - k0 + ahead <= i - q0: `ahead` is the first key's position minus the first query's, negative if it is earlier."""

    q0: int
    q1: int
    k0: int
    k1: int
    ahead: int

    def mask(self, window: int | None, device: torch.device) -> Tensor | None:
        """[q1 - q0, k1 - k0] of what is seen; None if it is all."""
        queries, keys = self.q1 - self.q0, self.k1 - self.k0
        causal = keys - 1 + self.ahead > 0
        if not causal and (window is None or queries - 1 - self.ahead < window):
            return None
        i = torch.arange(queries, device=device)[:, None]
        j = torch.arange(self.ahead, self.ahead + keys, device=device)[None, :]
        seen = j <= i
        return seen if window is None else seen & (j > i - window)


@dataclass(frozen=True)
class ContextBatch(TokenBatch):
    """A rank's part of a packed stream. As a TokenBatch it describes the rank's own tokens, cut where documents or
    pieces end; `whole` is the stream, `index` [T / cp] the place of each own token in it."""

    whole: TokenBatch | None = None
    index: Tensor | None = None
    pieces: tuple[tuple[int, int], ...] = ()
    """Begin and end of each of the 2 · cp pieces of the stream."""
    made: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """What the layers have derived from the batch and share."""

    @property
    def stream(self) -> TokenBatch:
        assert self.whole is not None  # `cut_stream` sets it
        return self.whole

    def sizes(self, cp: int) -> list[int]:
        """Tokens of each rank."""
        return [sum(b - a for a, b in (self.pieces[p] for p in pieces_of(r, cp))) for r in range(cp)]


def pieces_of(rank: int, cp: int) -> tuple[int, int]:
    """The pieces of a rank."""
    return rank, 2 * cp - 1 - rank


def own_pieces(batch: TokenBatch, group: Group) -> tuple[int, ...]:
    """Tokens of each piece of the stream that this rank holds, in the order of its rows."""
    if not isinstance(batch, ContextBatch):
        return (batch.num_tokens,)
    return tuple(b - a for a, b in (batch.pieces[p] for p in pieces_of(group.rank, group.size)))


def cut_stream(
    lengths: Sequence[int], group: Group, device: torch.device, rope_lengths: Sequence[int] | None = None
) -> ContextBatch:
    """The rank's part of a stream of whole documents of these lengths."""
    whole = TokenBatch.packed(lengths, device, rope_lengths)
    bounds = even_bounds(whole.num_tokens, 2 * group.size)
    pieces = tuple(pairwise(bounds))
    documents = list(pairwise(accumulate(lengths, initial=0)))
    segments: list[tuple[int, int, int]] = []  # begin, end, document
    for piece in pieces_of(group.rank, group.size):
        a, b = pieces[piece]
        segments += [
            (max(a, begin), min(b, end), d)
            for d, (begin, end) in enumerate(documents)
            if begin < b and end > a
        ]
    index = torch.cat([torch.arange(a, b) for a, b, _ in segments]).to(device)
    own = [b - a for a, b, _ in segments]
    contexts = [b - documents[d][0] for _, b, d in segments]
    return ContextBatch(
        positions=whole.positions[index],
        cu_seqlens=torch.tensor(list(accumulate(own, initial=0)), dtype=torch.int32, device=device),
        context_lens=torch.tensor(contexts, dtype=torch.int32, device=device),
        lengths=tuple(own),
        contexts=tuple(contexts),
        rope_lengths=tuple(whole.rope_lengths[d] for _, _, d in segments),
        whole=whole,
        index=index,
        pieces=pieces,
    )


def rectangles(batch: ContextBatch, rank: int, source: int, cp: int) -> list[Rectangle]:
    """What of rank `source`'s keys rank `rank`'s queries see, in each rank's own numbering."""
    documents = list(pairwise(accumulate(batch.stream.lengths, initial=0)))
    found = []
    query_begin = 0
    for query_piece in pieces_of(rank, cp):
        qa, qb = batch.pieces[query_piece]
        key_begin = 0
        for key_piece in pieces_of(source, cp):
            ka, kb = batch.pieces[key_piece]
            if key_piece <= query_piece:
                for begin, end in documents:
                    q0, q1 = max(begin, qa), min(end, qb)
                    k0, k1 = max(begin, ka), min(end, kb)
                    if q0 < q1 and k0 < k1:
                        found.append(
                            Rectangle(
                                query_begin + q0 - qa,
                                query_begin + q1 - qa,
                                key_begin + k0 - ka,
                                key_begin + k1 - ka,
                                k0 - q0,
                            )
                        )
            key_begin += kb - ka
        query_begin += qb - qa
    return found


def whole_values(own: Tensor, index: Tensor, total: int, group: Group) -> Tensor:
    """[total] on every rank from each rank's own values and their places, 0 where nobody has one; differentiable.

    Each rank then computes the same of them, so the gradient of a rank's values is its own.
    """
    out: Tensor = _WholeValues.apply(own, index, total, group)
    return out


class _WholeValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, index: Tensor, total: int, group: Group) -> Tensor:
        ctx.save_for_backward(index)
        return all_reduce(own.new_zeros(total).index_copy_(0, index, own), group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        return grad[index], None, None, None
