"""log softmax(z / temperature)[target]: the one routine behind the engine's and the trainer's log-probabilities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mainspring.ops.cpu import log_probs as cpu
from mainspring.ops.cpu.support import refuses
from mainspring.ops.linear import linear
from mainspring.ops.policy import LOCKSTEP, Policy
from mainspring.ops.precision import accumulator
from mainspring.ops.registry import Implementation, Operation, accepts_all
from mainspring.ops.triton.support import refuses as triton_refuses

LOGIT_CHUNK_ELEMENTS = 1 << 24  # logits held at once, 64 MB of fp32


def token_log_probs(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, *, policy: Policy = LOCKSTEP
) -> Tensor:
    """logits: [M, V] float32, targets: [M] int64 -> [M] float32: log softmax(logits / temperature)[target]."""
    return TOKEN_LOG_PROBS.select(logits, policy)(logits, targets, temperature)


def linear_log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, *, policy: Policy = LOCKSTEP
) -> Tensor:
    """token_log_probs(hidden weightᵀ, targets), in chunks of rows: the logits are never held all at once.

    hidden: [M, H], weight: [V, H], targets: [M] int64 -> [M] float32, differentiable once.
    """
    result: Tensor = _LinearLogProbs.apply(hidden, weight, targets, temperature, policy)
    return result


def rows_per_chunk(vocab_size: int) -> int:
    """How many rows of logits are held at once."""
    return max(16, LOGIT_CHUNK_ELEMENTS // vocab_size)


def reference(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    # One row at a time would be the plain formula; torch reduces rows of a 2-D tensor independently already.
    log_p = torch.log_softmax(logits / temperature, dim=-1)
    return log_p.gather(1, targets[:, None])[:, 0]


class _LinearLogProbs(torch.autograd.Function):
    """Backward recomputes each chunk's logits: d log p / dz = (onehot - softmax(z / t)) / t."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, policy: Policy
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature, ctx.policy = temperature, policy
        rows = rows_per_chunk(weight.shape[0])
        pieces = [
            token_log_probs(
                linear(h, weight, out_dtype=accumulator(hidden.dtype), policy=policy),
                t,
                temperature,
                policy=policy,
            )
            for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)
        ]
        return torch.cat(pieces)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        rows = rows_per_chunk(weight.shape[0])
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=accumulator(weight.dtype))
        chunks = (hidden, targets, grad, grad_hidden)
        for h, t, g, out in zip(*(x.split(rows) for x in chunks), strict=True):
            logits = linear(h, weight, out_dtype=accumulator(hidden.dtype), policy=ctx.policy)
            d_logits = torch.softmax(logits / ctx.temperature, dim=-1).neg_()
            d_logits.scatter_add_(1, t[:, None], torch.ones_like(g)[:, None])
            d_logits = (d_logits * (g / ctx.temperature)[:, None]).to(hidden.dtype)
            torch.mm(d_logits, weight, out=out)
            grad_weight += d_logits.t() @ h
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def _triton(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    from mainspring.ops.triton.log_probs import token_log_probs as triton_token_log_probs

    return triton_token_log_probs(logits, targets, temperature)


TOKEN_LOG_PROBS = Operation(
    "token_log_probs",
    Implementation("cpu", cpu.token_log_probs, refuses),
    Implementation("triton", _triton, triton_refuses),
    Implementation("reference", reference, accepts_all),
)
