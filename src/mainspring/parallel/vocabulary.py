"""Embedding, output head and cross-entropy with the vocabulary cut over the tensor-parallel ranks.

Logits are never gathered for a loss: a row's ranks exchange three numbers, the largest of their logits, the sum of
their exponentials and the target's logit (Shoeybi et al., arXiv 1909.08053, section 3).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mainspring import ops
from mainspring.ops import IGNORE_INDEX
from mainspring.ops.logit_loss import WeightGradient, product_for, rows_per_chunk, scaled
from mainspring.ops.precision import accumulator
from mainspring.parallel.collectives import gather_rows, gather_terms, in_order
from mainspring.parallel.mesh import even_bounds
from mainspring.parallel.tensor import TensorParallel, start_sum


def embed(tokens: Tensor, weight: Tensor, vocab_size: int, tp: TensorParallel) -> Tensor:
    """tokens: [T], weight: the rank's rows -> [T, H] (the rank's rows, if the sequence is sliced)."""
    if tp.group.size == 1:
        return F.embedding(tokens, weight)
    first = even_bounds(vocab_size, tp.group.size)[tp.group.rank]
    out: Tensor = _Lookup.apply(tokens - first, weight, tp)
    return out


def token_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, tp: TensorParallel
) -> Tensor:
    """The sum of -log p over targets [T] (IGNORE_INDEX is left out), a scalar that is the same on every rank.

    hidden: [T, H], or the rank's rows of it; weight: the rank's rows of the output embedding.
    """
    if tp.group.size == 1:
        return ops.cross_entropy(hidden, weight, targets, reduction="sum", policy=tp.policy)
    first = even_bounds(vocab_size, tp.group.size)[tp.group.rank]
    wants_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss: Tensor = _VocabularyLoss.apply(hidden, weight, targets, first, tp, wants_grad)
    return loss


@torch.no_grad()
def whole_logits(hidden: Tensor, weight: Tensor, vocab_size: int, tp: TensorParallel) -> Tensor:
    """hidden: [N, H], the same on every rank -> [N, V] float32 on every rank, for a sampler."""
    own = ops.linear(hidden, weight, out_dtype=accumulator(hidden.dtype), policy=tp.policy)
    if tp.group.size == 1:
        return own
    return gather_rows(own.t().contiguous(), vocab_size, tp.group).t()


class _Lookup(torch.autograd.Function):
    """Rows that other ranks hold are zeros here; the sum over the ranks has one term that is not zero."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, weight: Tensor, tp: TensorParallel) -> Tensor:
        held = (local >= 0) & (local < weight.shape[0])
        index = torch.where(held, local, 0)
        ctx.save_for_backward(index, held)
        ctx.rows, ctx.tokens, ctx.tp = weight.shape[0], tp.tokens, tp
        return start_sum(F.embedding(index, weight) * held[:, None], tp)()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        index, held = ctx.saved_tensors
        tp: TensorParallel = ctx.tp
        grad = gather_rows(grad, ctx.tokens, tp.group) if tp.sliced else grad
        d_weight = torch.ops.aten.embedding_dense_backward(grad * held[:, None], index, ctx.rows, -1, False)
        return None, d_weight, None


class _VocabularyLoss(torch.autograd.Function):
    """Gradients are computed with the logits of each chunk of rows, as `ops.cross_entropy` does."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        first: int,
        tp: TensorParallel,
        wants_grad: bool,
    ) -> Tensor:
        whole = gather_rows(hidden, tp.tokens, tp.group) if tp.sliced else hidden
        rows = rows_per_chunk(weight.shape[0], whole.device)
        grad_hidden = torch.empty_like(whole) if wants_grad else None
        grad_weight = WeightGradient(weight.dtype, -(-whole.shape[0] // rows))
        total = torch.zeros((), dtype=accumulator(hidden.dtype), device=hidden.device)
        for begin in range(0, whole.shape[0], rows):
            chunk = slice(begin, begin + rows)
            logits = product_for(whole[chunk], weight, tp.policy, wants_grad)
            losses, d_logits = vocabulary_loss(logits, targets[chunk], first, tp)
            total = total + losses.sum()
            if grad_hidden is not None:
                narrow = d_logits.to(hidden.dtype)
                torch.mm(narrow, weight, out=grad_hidden[chunk])
                grad_weight.add(narrow, whole[chunk])
        if grad_hidden is not None:
            of_weight = torch.zeros_like(weight) if grad_weight.total is None else grad_weight.total
            ctx.save_for_backward(start_sum(grad_hidden, tp)(), of_weight)
            ctx.dtype, ctx.policy = weight.dtype, tp.policy
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            scaled(grad_hidden, grad, grad_hidden.dtype, ctx.policy),
            scaled(grad_weight, grad, ctx.dtype, ctx.policy),
            None, None, None, None,
        )  # fmt: skip


def vocabulary_loss(logits: Tensor, targets: Tensor, first: int, tp: TensorParallel) -> tuple[Tensor, Tensor]:
    """(-log p of each target [M], softmax - onehot of the rank's logits [M, V / tp]), 0 where a target is left out.

    logits: the rank's, from vocabulary index `first` on, used up.
    """
    kept = targets != IGNORE_INDEX
    local = targets - first
    held = kept & (local >= 0) & (local < logits.shape[1])
    index = torch.where(held, local, 0)[:, None]
    largest = logits.amax(-1)
    target = torch.where(held, logits.gather(1, index)[:, 0], 0)
    exponentials = logits.sub_(largest[:, None]).exp_()
    mine = torch.stack([largest, exponentials.sum(-1), target])
    theirs = [term.unbind(0) for term in gather_terms(mine, tp.group)]
    top = torch.stack([m for m, _, _ in theirs]).amax(0)
    total = in_order([s * torch.exp(m - top) for m, s, _ in theirs])
    losses = torch.where(kept, total.log() + top - in_order([t for _, _, t in theirs]), 0)
    d_logits = exponentials.mul_((torch.exp(largest - top) / total * kept)[:, None])
    d_logits.scatter_add_(1, index, -held.to(d_logits.dtype)[:, None])
    return losses, d_logits
