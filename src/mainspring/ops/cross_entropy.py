"""Linear + cross-entropy that computes its gradient while the logits of a chunk are at hand."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from mainspring.errors import BackendError
from mainspring.ops import library
from mainspring.ops.checks import check_indices, check_product, check_targets
from mainspring.ops.log_probs import recomputed_gradients
from mainspring.ops.logit_loss import (
    IGNORE_INDEX,
    LossOptions,
    logit_loss,
    product_for,
    rows_per_chunk,
    scaled,
    weight_gradient_of,
)
from mainspring.ops.policy import LOCKSTEP, Policy
from mainspring.ops.precision import accumulator
from mainspring.ops.registry import any_requires_grad

Reduction = Literal["mean", "sum", "none"]


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    policy: Policy = LOCKSTEP,
) -> Tensor:
    """-log softmax(hidden weightᵀ)[target], over the targets that are not ignore_index.

    hidden: [T, H], weight: [V, H], targets: [T] int64 -> scalar float32 (mean, of no target 0; or sum), or [T] with
    0 where a target is left out; differentiable once. `LossOptions` has the formula of the options.

    Only a chunk of logits exists at a time. For "mean" and "sum" the gradients are computed with them, so the
    backward pass is only a scaling; for "none" it computes the logits again. Source of the idea: Liger-Kernel,
    "fused linear cross entropy" (arXiv 2410.10989), section 3.2. Raises BackendError for a value out of range.
    """
    options = LossOptions(
        softcap=softcap, label_smoothing=label_smoothing, z_loss=z_loss, ignore_index=ignore_index
    )
    _check(hidden, weight, targets, reduction, ignore_index)
    if library.is_traced():
        if reduction == "none":
            return library.row_cross_entropy(hidden, weight, targets, options, policy)
        return library.linear_cross_entropy(hidden, weight, targets, options, reduction == "mean", policy)
    wants_grad = any_requires_grad(hidden, weight)
    result: Tensor
    if reduction == "none":
        result = _RowLosses.apply(hidden, weight, targets, options, policy, wants_grad)
    else:
        result = _LinearCrossEntropy.apply(
            hidden, weight, targets, options, reduction == "mean", policy, wants_grad
        )
    return result


def reference(hidden: Tensor, weight: Tensor, targets: Tensor, options: LossOptions | None = None) -> Tensor:
    """Each row's loss [T], the formula with all logits at once."""
    options = options or LossOptions()
    logits = hidden @ weight.t()
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    losses = torch.nn.functional.cross_entropy(
        logits,
        targets,
        ignore_index=options.ignore_index,
        label_smoothing=options.label_smoothing,
        reduction="none",
    )
    penalty = options.z_loss * torch.logsumexp(logits, -1).square()
    return losses + torch.where(targets != options.ignore_index, penalty, 0)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str, ignore_index: int) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise BackendError(f"cross_entropy: reduction must be 'mean', 'sum' or 'none', not {reduction!r}")
    if not hidden.is_floating_point():
        raise BackendError(f"cross_entropy: computes in floating dtypes, not in {hidden.dtype}")
    check_product("cross_entropy", hidden, weight)
    check_targets("cross_entropy", targets, hidden)
    check_indices("cross_entropy", "target", targets, weight.shape[0], ignored=ignore_index)


def loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    options: LossOptions,
    mean: bool,
    policy: Policy,
    wants_grad: bool,
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
    """(loss [], the mean's divisor [] or None, gradients of the sum by hidden and weight or None).

    The weight's gradient is in `weight_gradient_of`'s dtype. Nothing is recorded.
    """
    wide = accumulator(hidden.dtype)
    rows = rows_per_chunk(weight.shape[0], hidden.device)
    count = (targets != options.ignore_index).sum().clamp_min(1).to(wide) if mean else None
    losses = torch.empty(targets.shape, dtype=wide, device=hidden.device)
    grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if wants_grad else None
    grad_weight = weight_gradient_of(hidden, weight)
    for first in range(0, hidden.shape[0], rows):
        chunk = slice(first, first + rows)
        logits = product_for(hidden[chunk], weight, policy, wants_grad)
        losses[chunk], d_logits = logit_loss(
            logits, targets[chunk], options, None, None, hidden.dtype if wants_grad else None, policy
        )
        del logits
        if grad_hidden is not None and d_logits is not None:
            torch.mm(d_logits, weight, out=grad_hidden[chunk])
            grad_weight.add(d_logits, hidden[chunk])
            del d_logits
    loss = losses.sum() if count is None else losses.sum() / count
    if grad_hidden is None:
        return loss, count, None
    total = grad_weight.total
    if total is None:
        total = torch.zeros(weight.shape, dtype=grad_weight.dtype, device=weight.device)
    return loss, count, (grad_hidden, total)


def row_losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, options: LossOptions, policy: Policy, wants_grad: bool
) -> Tensor:
    """Each row's loss [T]. Nothing is recorded."""
    rows = rows_per_chunk(weight.shape[0], hidden.device)
    losses = torch.empty(targets.shape, dtype=accumulator(hidden.dtype), device=hidden.device)
    for first in range(0, hidden.shape[0], rows):
        chunk = slice(first, first + rows)
        logits = product_for(hidden[chunk], weight, policy, wants_grad)
        losses[chunk] = logit_loss(logits, targets[chunk], options, None, None, None, policy)[0]
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum or mean. Gradients of the sum are kept; how they count is known in the backward pass, in float32."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        options: LossOptions,
        mean: bool,
        policy: Policy,
        wants_grad: bool,
    ) -> Tensor:
        loss, count, grads = loss_and_gradients(hidden, weight, targets, options, mean, policy, wants_grad)
        if grads is not None:
            ctx.save_for_backward(*grads, count)
            ctx.dtype, ctx.policy = weight.dtype, policy
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, count = ctx.saved_tensors
        scale = grad if count is None else grad / count
        return (
            scaled(grad_hidden, scale, grad_hidden.dtype, ctx.policy),
            scaled(grad_weight, scale, ctx.dtype, ctx.policy),
            None,
            None,
            None,
            None,
            None,
        )


class _RowLosses(torch.autograd.Function):
    """Each row's own loss: what its gradient counts is known only in the backward pass, which recomputes logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        options: LossOptions,
        policy: Policy,
        wants_grad: bool,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        ctx.options, ctx.policy = options, policy
        return row_losses(hidden, weight, targets, options, policy, wants_grad)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        grads = recomputed_gradients(hidden, weight, targets, ctx.options, grad, None, ctx.policy)
        return *grads, None, None, None, None
