"""Linear + cross-entropy that computes its gradient while the logits of a chunk are at hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mainspring.ops.linear import LINEAR
from mainspring.ops.log_probs import rows_per_chunk
from mainspring.ops.policy import LOCKSTEP, Policy
from mainspring.ops.precision import accumulator

IGNORE_INDEX = -100


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, policy: Policy = LOCKSTEP) -> Tensor:
    """Mean over the targets that are not -100 of -log softmax(hidden weightᵀ)[target].

    hidden: [T, H], weight: [V, H], targets: [T] int64 -> scalar float32, differentiable once. Only a
    chunk of logits exists at a time; the gradients are computed with them, so the backward pass is free.
    Source of the idea: Liger-Kernel, "fused linear cross entropy" (arXiv 2410.10989), section 3.2.
    """
    wants_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    result: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, policy, wants_grad)
    return result


def reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The formula with all logits at once."""
    return torch.nn.functional.cross_entropy(hidden @ weight.t(), targets, ignore_index=IGNORE_INDEX)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, policy: Policy, wants_grad: bool
    ) -> Tensor:
        # Chosen as for a recorded call: inside this function autograd is off.
        product = LINEAR.select(hidden, policy, needs_grad=wants_grad)
        rows = rows_per_chunk(weight.shape[0])
        count = (targets != IGNORE_INDEX).sum().clamp_min(1)
        losses = []
        grad_hidden = torch.empty_like(hidden) if wants_grad else None
        grad_weight: Tensor | None = None
        for first in range(0, hidden.shape[0], rows):
            chunk = slice(first, first + rows)
            logits = product(hidden[chunk], weight, None, accumulator(hidden.dtype), policy)
            kept = targets[chunk] != IGNORE_INDEX
            target = torch.where(kept, targets[chunk], 0)[:, None]
            log_probs = torch.log_softmax(logits, dim=-1)
            del logits
            losses.append((log_probs.gather(1, target)[:, 0] * kept).sum())
            if grad_hidden is None:
                continue
            # The log-probabilities become the gradient in place: d loss / d z = (softmax(z) - onehot) / count.
            d_logits = log_probs.exp_()
            d_logits.scatter_add_(1, target, d_logits.new_full((target.shape[0], 1), -1.0))
            d_logits = d_logits.mul_(kept[:, None]).div_(count).to(hidden.dtype)
            torch.mm(d_logits, weight, out=grad_hidden[chunk])
            piece = d_logits.t() @ hidden[chunk]
            grad_weight = piece if grad_weight is None else grad_weight.add_(piece)
        if grad_hidden is not None and grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight)
        return -torch.stack(losses).sum() / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            grad_hidden * grad.to(grad_hidden.dtype),
            grad_weight * grad.to(grad_weight.dtype),
            None,
            None,
            None,
        )
