"""Log-probabilities of given tokens, and entropies, with the vocabulary cut over the tensor-parallel ranks.

As `ops.linear_log_probs`, for the hidden states that `ParallelDecoder.forward` gives: the same on every rank of the
group, which then all give the same numbers. With x = z / t over the ranks' logits, m the largest, lse = m + log sum
exp(x - m): log p = x[target] - lse and H = lse - sum p x. A chunk's logits are computed again in the backward pass.

In lockstep a chunk's logits are gathered and go through the operation that the engine at the same degree takes, so the
numbers are the engine's to the bit. Otherwise the ranks exchange four numbers a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mainspring.ops.log_probs import linear_log_probs, linear_log_probs_and_entropy
from mainspring.ops.log_probs import token_log_probs as token_log_probs_of
from mainspring.ops.logit_loss import WeightGradient, product_for, rows_per_chunk
from mainspring.ops.precision import accumulator
from mainspring.parallel.collectives import all_reduce, gather_rows, gather_terms, in_order
from mainspring.parallel.mesh import even_bounds
from mainspring.parallel.tensor import TensorParallel


def token_log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, temperature: float, tp: TensorParallel
) -> Tensor:
    """hidden: [M, H], weight: the rank's rows of the output embedding, targets: [M] -> [M] float32, differentiable."""
    if tp.group.size == 1:
        return linear_log_probs(hidden, weight, targets, temperature, policy=tp.policy)
    log_p: Tensor = _LogProbs.apply(hidden, weight, targets, vocab_size, temperature, False, tp)[0]
    return log_p


def token_log_probs_and_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, temperature: float, tp: TensorParallel
) -> tuple[Tensor, Tensor]:
    """(`token_log_probs` to the same bits, entropies in nats [M] float32), both differentiable."""
    if tp.group.size == 1:
        return linear_log_probs_and_entropy(hidden, weight, targets, temperature, policy=tp.policy)
    found: tuple[Tensor, Tensor] = _LogProbs.apply(hidden, weight, targets, vocab_size, temperature, True, tp)
    return found


class _LogProbs(torch.autograd.Function):
    """d log p / dx = onehot - p and dH / dx = -p (log p + H), each over t by the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab_size: int,
        temperature: float,
        with_entropy: bool,
        tp: TensorParallel,
    ) -> tuple[Tensor, Tensor | None]:
        found = [
            _forward_chunk(h, weight, t, vocab_size, temperature, with_entropy, tp)
            for h, t in zip(*(x.split(_rows(weight)) for x in (hidden, targets)), strict=True)
        ]
        log_p, lse, entropy = (torch.cat(pieces) for pieces in zip(*found, strict=True))
        ctx.save_for_backward(hidden, weight, targets, lse, entropy)
        ctx.vocab_size, ctx.temperature, ctx.with_entropy, ctx.tp = vocab_size, temperature, with_entropy, tp
        ctx.set_materialize_grads(False)
        return log_p, entropy if with_entropy else None

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None and grad_entropy is None:
            return (None,) * 7
        hidden, weight, targets, lse, entropy = ctx.saved_tensors
        tp: TensorParallel = ctx.tp
        first = even_bounds(ctx.vocab_size, tp.group.size)[tp.group.rank]
        grad = lse.new_zeros(lse.shape) if grad is None else grad
        grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        rows = _rows(weight)
        grad_weight = WeightGradient(weight.dtype, -(-hidden.shape[0] // rows))
        for begin in range(0, hidden.shape[0], rows):
            chunk = slice(begin, begin + rows)
            x = product_for(hidden[chunk], weight, tp.policy, True).div_(ctx.temperature)
            log_p = x.sub_(lse[chunk, None])  # of every token of the rank's vocabulary
            p = log_p.exp()
            d_x = p * -grad[chunk, None]
            if grad_entropy is not None:
                d_x -= p * (log_p + entropy[chunk, None]) * grad_entropy[chunk, None]
            index, held = _held(targets[chunk], first, weight.shape[0])
            d_x.scatter_add_(1, index[:, None], (grad[chunk] * held)[:, None])
            narrow = d_x.div_(ctx.temperature).to(hidden.dtype)
            torch.mm(narrow, weight, out=grad_hidden[chunk])
            grad_weight.add(narrow, hidden[chunk])
        # Every rank has the same rows, whose gradient is the sum over the ranks' parts of the vocabulary.
        whole = (
            in_order(gather_terms(grad_hidden, tp.group)) if tp.ordered else all_reduce(grad_hidden, tp.group)
        )
        of_weight = (
            torch.zeros_like(weight) if grad_weight.total is None else grad_weight.total.to(weight.dtype)
        )
        return whole, of_weight, None, None, None, None, None


def _rows(weight: Tensor) -> int:
    return rows_per_chunk(weight.shape[0], weight.device)


def _forward_chunk(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    temperature: float,
    with_entropy: bool,
    tp: TensorParallel,
) -> tuple[Tensor, Tensor, Tensor]:
    """(log p, lse, entropy or zeros), each [rows]."""
    logits = product_for(hidden, weight, tp.policy, True)
    wide = accumulator(hidden.dtype)
    whole = None
    if tp.ordered:
        whole = gather_rows(logits.t().contiguous(), vocab_size, tp.group).t().contiguous()
    first = even_bounds(vocab_size, tp.group.size)[tp.group.rank]
    x = logits.to(wide).div_(temperature)
    index, held = _held(targets, first, weight.shape[0])
    largest = x.amax(-1)
    target = torch.where(held, x.gather(1, index[:, None])[:, 0], 0)
    exponentials = (x - largest[:, None]).exp_()
    weighted = (exponentials * x).sum(-1) if with_entropy else torch.zeros_like(largest)
    mine = torch.stack([largest, exponentials.sum(-1), target, weighted])
    theirs = [term.unbind(0) for term in gather_terms(mine, tp.group)]
    top = torch.stack([m for m, _, _, _ in theirs]).amax(0)
    total = in_order([s * torch.exp(m - top) for m, s, _, _ in theirs])
    lse = top + total.log()
    entropy = torch.zeros_like(lse)
    if with_entropy:
        entropy = lse - in_order([w * torch.exp(m - top) for m, _, _, w in theirs]) / total
    log_p = in_order([t for _, _, t, _ in theirs]) - lse
    if whole is not None:
        log_p = token_log_probs_of(whole, targets, temperature, policy=tp.policy)
    return log_p, lse, entropy


def _held(targets: Tensor, first: int, rows: int) -> tuple[Tensor, Tensor]:
    """(where each target is among the rank's rows, 0 if elsewhere; whether it is here), both [M]."""
    local = targets - first
    held = (local >= 0) & (local < rows)
    return torch.where(held, local, 0), held
