"""Losses and log-probabilities as PyTorch operators.

The fused losses compute their gradients while a chunk's logits are at hand, so the gradient of the sum is one of an
operator's results, which the backward pass only scales.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mainspring.ops.library.support import policy_of
from mainspring.ops.policy import Policy
from mainspring.ops.precision import accumulator
from mainspring.ops.registry import any_requires_grad

if TYPE_CHECKING:
    from mainspring.ops.logit_loss import LossOptions

# An operator's arguments are plain values: the fields of LossOptions, in their order.
Options = tuple[float, float | None, float, float, int]


def _plain(options: LossOptions) -> Options:
    return (
        options.temperature, options.softcap, options.label_smoothing, options.z_loss, options.ignore_index,
    )  # fmt: skip


# ---- linear + cross-entropy ----------------------------------------------------------------------------------------


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, options: LossOptions, mean: bool, policy: Policy
) -> Tensor:
    """The sum or mean of ops.cross_entropy.cross_entropy as an operator."""
    result: Tensor = linear_cross_entropy_op(
        hidden, weight, targets, any_requires_grad(hidden, weight), *_plain(options), mean, policy.numerics,
        policy.backend,
    )[0]  # fmt: skip
    return result


@torch.library.custom_op("mainspring::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    needs_grad: bool,
    temperature: float,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    ignore_index: int,
    mean: bool,
    numerics: str,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss [], by what the sum was divided [], gradients of the sum by hidden and weight, empty if not needed)."""
    from mainspring.ops.cross_entropy import loss_and_gradients
    from mainspring.ops.logit_loss import LossOptions

    options = LossOptions(temperature, softcap, label_smoothing, z_loss, ignore_index)
    policy = policy_of(numerics, backend)
    with torch.no_grad():
        loss, count, grads = loss_and_gradients(hidden, weight, targets, options, mean, policy, needs_grad)
    if grads is None:
        grads = hidden.new_empty(0), weight.new_empty(0)
    return loss, torch.ones_like(loss) if count is None else count, *grads


@linear_cross_entropy_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, needs_grad: bool, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from mainspring.ops.logit_loss import weight_gradient_of

    loss, count = (hidden.new_empty((), dtype=accumulator(hidden.dtype)) for _ in range(2))
    if not needs_grad:
        return loss, count, hidden.new_empty(0), weight.new_empty(0)
    dtype = weight_gradient_of(hidden, weight).dtype
    return loss, count, hidden.new_empty(hidden.shape), weight.new_empty(weight.shape, dtype=dtype)


@torch.library.custom_op("mainspring::scaled", mutates_args=())
def scaled_op(x: Tensor, scale: Tensor, dtype: torch.dtype, numerics: str, backend: str | None) -> Tensor:
    """x · scale, a scalar, in dtype."""
    from mainspring.ops.logit_loss import scaled

    return scaled(x, scale, dtype, policy_of(numerics, backend))


@scaled_op.register_fake
def _(x: Tensor, scale: Tensor, dtype: torch.dtype, *_: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _cross_entropy_keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.dtype, (ctx.numerics, ctx.backend) = inputs[1].dtype, inputs[-2:]
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _cross_entropy_gradient(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    count, grad_hidden, grad_weight = ctx.saved_tensors
    scale = grad / count
    return (
        scaled_op(grad_hidden, scale, grad_hidden.dtype, ctx.numerics, ctx.backend),
        scaled_op(grad_weight, scale, ctx.dtype, ctx.numerics, ctx.backend),
        *(None,) * 10,
    )


linear_cross_entropy_op.register_autograd(_cross_entropy_gradient, setup_context=_cross_entropy_keep)


# ---- what computes the logits again for its gradient ---------------------------------------------------------------


@torch.library.custom_op("mainspring::recomputed_gradients", mutates_args=())
def recomputed_gradients_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    ignore_index: int,
    row_weights: Tensor,
    entropy_weights: Tensor | None,
    numerics: str,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Gradients by hidden and weight of sum row_weights · loss + entropy_weights · entropy."""
    from mainspring.ops.log_probs import recomputed_gradients
    from mainspring.ops.logit_loss import LossOptions

    options = LossOptions(temperature, softcap, label_smoothing, z_loss, ignore_index)
    return recomputed_gradients(
        hidden, weight, targets, options, row_weights, entropy_weights, policy_of(numerics, backend)
    )


@recomputed_gradients_op.register_fake
def _(hidden: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


def row_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, options: LossOptions, policy: Policy
) -> Tensor:
    """Each row's own loss of ops.cross_entropy.cross_entropy as an operator."""
    result: Tensor = row_cross_entropy_op(
        hidden, weight, targets, *_plain(options), any_requires_grad(hidden, weight), policy.numerics, policy.backend
    )  # fmt: skip
    return result


@torch.library.custom_op("mainspring::row_cross_entropy", mutates_args=())
def row_cross_entropy_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    ignore_index: int,
    needs_grad: bool,
    numerics: str,
    backend: str | None,
) -> Tensor:
    """Losses [T]."""
    from mainspring.ops.cross_entropy import row_losses
    from mainspring.ops.logit_loss import LossOptions

    options = LossOptions(temperature, softcap, label_smoothing, z_loss, ignore_index)
    with torch.no_grad():
        return row_losses(hidden, weight, targets, options, policy_of(numerics, backend), needs_grad)


@row_cross_entropy_op.register_fake
def _(hidden: Tensor, *_: Any) -> Tensor:
    return hidden.new_empty(hidden.shape[:1], dtype=accumulator(hidden.dtype))


def _rows_keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    *ctx.options, _, ctx.numerics, ctx.backend = inputs[3:]


def _rows_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = recomputed_gradients_op(*ctx.saved_tensors, *ctx.options, grad, None, ctx.numerics, ctx.backend)
    return (*grads, *(None,) * 9)


row_cross_entropy_op.register_autograd(_rows_gradient, setup_context=_rows_keep)


def linear_log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, policy: Policy
) -> Tensor:
    """ops.log_probs.linear_log_probs as an operator."""
    needs_grad = any_requires_grad(hidden, weight)
    result: Tensor = linear_log_probs_op(
        hidden, weight, targets, temperature, False, needs_grad, policy.numerics, policy.backend
    )[0]
    return result


def linear_log_probs_and_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, policy: Policy
) -> tuple[Tensor, Tensor]:
    """ops.log_probs.linear_log_probs_and_entropy as an operator."""
    needs_grad = any_requires_grad(hidden, weight)
    result: tuple[Tensor, Tensor] = linear_log_probs_op(
        hidden, weight, targets, temperature, True, needs_grad, policy.numerics, policy.backend
    )
    return result


@torch.library.custom_op("mainspring::linear_log_probs", mutates_args=())
def linear_log_probs_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    with_entropy: bool,
    needs_grad: bool,
    numerics: str,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """(log-probabilities [M], entropies [M], or [0] without)."""
    from mainspring.ops.log_probs import chunked_log_probs

    policy = policy_of(numerics, backend)
    with torch.no_grad():
        log_probs, entropy = chunked_log_probs(
            hidden, weight, targets, temperature, with_entropy, policy, needs_grad
        )
    return log_probs, log_probs.new_empty(0) if entropy is None else entropy


@linear_log_probs_op.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, with_entropy: bool, *_: Any
) -> tuple[Tensor, Tensor]:
    log_probs = hidden.new_empty(hidden.shape[:1], dtype=accumulator(hidden.dtype))
    return log_probs, torch.empty_like(log_probs) if with_entropy else log_probs.new_empty(0)


def _log_probs_keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.temperature, ctx.with_entropy, _, ctx.numerics, ctx.backend = inputs[3:]


def _log_probs_gradient(ctx: Any, grad: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
    from mainspring.ops.log_probs import options_at

    grads = recomputed_gradients_op(
        *ctx.saved_tensors, *_plain(options_at(ctx.temperature)), -grad,
        grad_entropy if ctx.with_entropy else None, ctx.numerics, ctx.backend,
    )  # fmt: skip
    return (*grads, *(None,) * 6)


linear_log_probs_op.register_autograd(_log_probs_gradient, setup_context=_log_probs_keep)


# ---- log-probabilities of logits that are at hand ------------------------------------------------------------------


def token_log_probs(logits: Tensor, targets: Tensor, temperature: float, policy: Policy) -> Tensor:
    """ops.log_probs.token_log_probs as an operator."""
    result: Tensor = token_log_probs_op(
        logits, targets, temperature, False, policy.numerics, policy.backend
    )[0]  # fmt: skip
    return result


def token_log_probs_and_entropy(
    logits: Tensor, targets: Tensor, temperature: float, policy: Policy
) -> tuple[Tensor, Tensor]:
    """ops.log_probs.token_log_probs_and_entropy as an operator."""
    result: tuple[Tensor, Tensor] = token_log_probs_op(
        logits, targets, temperature, True, policy.numerics, policy.backend
    )
    return result


@torch.library.custom_op("mainspring::token_log_probs", mutates_args=())
def token_log_probs_op(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    with_entropy: bool,
    numerics: str,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """(log-probabilities [M], entropies [M], or [0] without)."""
    from mainspring.ops.log_probs import TOKEN_LOG_PROBS, TOKEN_LOG_PROBS_AND_ENTROPY

    policy = policy_of(numerics, backend)
    with torch.no_grad():
        if with_entropy:
            return TOKEN_LOG_PROBS_AND_ENTROPY.select(logits, policy)(logits, targets, temperature)
        log_probs = TOKEN_LOG_PROBS.select(logits, policy)(logits, targets, temperature)
    return log_probs, log_probs.new_empty(0)


@token_log_probs_op.register_fake
def _(
    logits: Tensor, targets: Tensor, temperature: float, with_entropy: bool, *_: Any
) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    return logits.new_empty(rows), logits.new_empty(rows if with_entropy else 0)


@torch.library.custom_op("mainspring::token_log_probs_backward", mutates_args=())
def token_log_probs_backward_op(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    grad: Tensor,
    grad_entropy: Tensor | None,
    numerics: str,
    backend: str | None,
) -> Tensor:
    """The gradient of logits, [M, V]."""
    from mainspring.ops.log_probs import logits_gradient

    return logits_gradient(logits, targets, temperature, grad, grad_entropy, policy_of(numerics, backend))


@token_log_probs_backward_op.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _token_keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.temperature, ctx.with_entropy, ctx.numerics, ctx.backend = inputs[2:]


def _token_gradient(ctx: Any, grad: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
    logits, targets = ctx.saved_tensors
    gradient = token_log_probs_backward_op(
        logits, targets, ctx.temperature, grad, grad_entropy if ctx.with_entropy else None, ctx.numerics, ctx.backend
    )  # fmt: skip
    return gradient, None, None, None, None, None


token_log_probs_op.register_autograd(_token_gradient, setup_context=_token_keep)
