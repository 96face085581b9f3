"""`linear` and `linear_tp_invariant` as PyTorch operators. Their gradients are plain products, which the compiler is
free to arrange."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mainspring.ops.library.support import policy_of
from mainspring.ops.policy import Policy
from mainspring.ops.registry import any_requires_grad


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None, policy: Policy
) -> Tensor:
    """ops.linear.linear as an operator."""
    needs_grad = any_requires_grad(x, weight, bias)
    result: Tensor = linear_op(x, weight, bias, out_dtype, needs_grad, policy.numerics, policy.backend)
    return result


@torch.library.custom_op("mainspring::linear", mutates_args=())
def linear_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
    needs_grad: bool,
    numerics: str,
    backend: str | None,
) -> Tensor:
    """x: [M, K], weight: [N, K], bias: [N] -> [M, N]."""
    from mainspring.ops.linear import LINEAR

    policy = policy_of(numerics, backend)
    with torch.no_grad():
        return LINEAR.select(x, policy, needs_grad)(x, weight, bias, out_dtype, policy)


@linear_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None, *_: Any) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=out_dtype or x.dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias = inputs[:3]
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    grad = grad.to(x.dtype)
    return (
        grad @ weight if ctx.needs_input_grad[0] else None,
        grad.t() @ x if ctx.needs_input_grad[1] else None,
        grad.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None,
        None,
        None,
        None,
        None,
    )


linear_op.register_autograd(_gradient, setup_context=_keep)


def linear_tp_invariant(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype, segments: int, policy: Policy
) -> Tensor:
    """ops.linear_tp_invariant.linear_tp_invariant as an operator."""
    needs_grad = any_requires_grad(x, weight, bias)
    result: Tensor = linear_tp_invariant_op(
        x, weight, bias, out_dtype, segments, needs_grad, policy.numerics, policy.backend
    )
    return result


@torch.library.custom_op("mainspring::linear_tp_invariant", mutates_args=())
def linear_tp_invariant_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    segments: int,
    needs_grad: bool,
    numerics: str,
    backend: str | None,
) -> Tensor:
    """x: [M, K], weight: [N, K], bias: [N] -> [M, N] of out_dtype, K summed in so many segments."""
    from mainspring.ops.linear_tp_invariant import LINEAR_TP_INVARIANT

    with torch.no_grad():
        run = LINEAR_TP_INVARIANT.select(x, policy_of(numerics, backend), needs_grad)
        return run(x, weight, bias, out_dtype, segments)


@linear_tp_invariant_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype, *_: Any) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=out_dtype)


def _tp_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_gradient(ctx, grad), None


linear_tp_invariant_op.register_autograd(_tp_gradient, setup_context=_keep)
