"""Routing, the experts' products and the sum of their outputs as PyTorch operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mainspring.ops.library.support import policy_of
from mainspring.ops.policy import Policy
from mainspring.ops.registry import any_requires_grad

# ---- routing -------------------------------------------------------------------------------------------------------


def route(
    logits: Tensor, top_k: int, normalise: bool, weights_dtype: torch.dtype, policy: Policy
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """ops.routing.route as an operator: the fields of its Routing."""
    routed: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = route_op(
        logits, top_k, normalise, weights_dtype, any_requires_grad(logits), policy.numerics, policy.backend
    )
    return routed


@torch.library.custom_op("mainspring::route", mutates_args=())
def route_op(
    logits: Tensor,
    top_k: int,
    normalise: bool,
    weights_dtype: torch.dtype,
    needs_grad: bool,
    numerics: str,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logits: [T, E] -> weights, experts [T, k], order [T · k], places [T, k], offsets [E + 1]."""
    from mainspring.ops.routing import ROUTE

    with torch.no_grad():
        run = ROUTE.select(logits, policy_of(numerics, backend), needs_grad)
        return run(logits, top_k, normalise, weights_dtype)


@route_op.register_fake
def _(
    logits: Tensor, top_k: int, normalise: bool, weights_dtype: torch.dtype, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, num_experts = logits.shape

    def integers(*shape: int) -> Tensor:
        return logits.new_empty(shape, dtype=torch.int32)

    weights = logits.new_empty((tokens, top_k), dtype=weights_dtype)
    order, places = integers(tokens * top_k), integers(tokens, top_k)
    return weights, integers(tokens, top_k), order, places, integers(num_experts + 1)


@torch.library.custom_op("mainspring::route_backward", mutates_args=())
def route_backward_op(
    logits: Tensor, experts: Tensor, grad: Tensor, normalise: bool, numerics: str, backend: str | None
) -> Tensor:
    """The gradient of logits, [T, E]; grad: that of the weights, [T, k]."""
    from mainspring.ops.routing import ROUTE_BACKWARD

    run = ROUTE_BACKWARD.select(logits, policy_of(numerics, backend))
    return run(logits, experts, grad.contiguous(), normalise)


@route_backward_op.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _route_keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, ctx.normalise, _, _, ctx.numerics, ctx.backend = inputs
    ctx.save_for_backward(logits, output[1])
    ctx.mark_non_differentiable(*output[1:])


def _route_gradient(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    logits, experts = ctx.saved_tensors
    gradient = route_backward_op(logits, experts, grad, ctx.normalise, ctx.numerics, ctx.backend)
    return gradient, None, None, None, None, None, None


route_op.register_autograd(_route_gradient, setup_context=_route_keep)


# ---- the experts' products -----------------------------------------------------------------------------------------


def grouped_linear(
    x: Tensor, weight: Tensor, offsets: Tensor, index: Tensor | None, places: Tensor | None, policy: Policy
) -> Tensor:
    """ops.grouped_linear.grouped_linear as an operator; index and places are those of the routing that gathers x."""
    result: Tensor = grouped_linear_op(
        x, weight, offsets, index, places, any_requires_grad(x, weight), policy.numerics, policy.backend
    )
    return result


@torch.library.custom_op("mainspring::grouped_linear", mutates_args=())
def grouped_linear_op(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    index: Tensor | None,
    places: Tensor | None,
    needs_grad: bool,
    numerics: str,
    backend: str | None,
) -> Tensor:
    """x: [R, K] or [T, K] with an index [R], weight: [E, N, K], offsets: [E + 1] -> [R, N]."""
    from mainspring.ops.grouped_linear import GROUPED_LINEAR

    policy = policy_of(numerics, backend)
    with torch.no_grad():
        return GROUPED_LINEAR.select(x, policy, needs_grad)(x, weight, offsets, index, policy)


@grouped_linear_op.register_fake
def _(x: Tensor, weight: Tensor, offsets: Tensor, index: Tensor | None, *_: Any) -> Tensor:
    return x.new_empty((x.shape[0] if index is None else index.shape[0], weight.shape[1]))


@torch.library.custom_op("mainspring::grouped_linear_backward", mutates_args=())
def grouped_linear_backward_op(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    index: Tensor | None,
    places: Tensor | None,
    needs_x: bool,
    needs_weight: bool,
    numerics: str,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """(gradient of x, gradient of weight), an empty tensor in place of one that is not needed."""
    from mainspring.ops.grouped_linear import GROUPED_LINEAR_BACKWARD

    run = GROUPED_LINEAR_BACKWARD.select(x, policy_of(numerics, backend))
    grads = run(grad.contiguous(), x, weight, offsets, index, places, needs_x, needs_weight)
    grad_x, grad_weight = (grad.new_empty(0) if g is None else g for g in grads)
    return grad_x, grad_weight


@grouped_linear_backward_op.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    index: Tensor | None,
    places: Tensor | None,
    needs_x: bool,
    needs_weight: bool,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape if needs_x else (0,)),
        weight.new_empty(weight.shape if needs_weight else (0,)),
    )


def _grouped_keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.numerics, ctx.backend = inputs[6:]


def _grouped_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    grad_x, grad_weight = grouped_linear_backward_op(
        grad, *ctx.saved_tensors, needs_x, needs_weight, ctx.numerics, ctx.backend
    )
    return grad_x if needs_x else None, grad_weight if needs_weight else None, *(None,) * 6


grouped_linear_op.register_autograd(_grouped_gradient, setup_context=_grouped_keep)


# ---- the sum of their outputs --------------------------------------------------------------------------------------


def combine(rows: Tensor, weights: Tensor, places: Tensor, order: Tensor, policy: Policy) -> Tensor:
    """ops.routing.combine as an operator."""
    needs_grad = any_requires_grad(rows, weights)
    result: Tensor = combine_op(rows, weights, places, order, needs_grad, policy.numerics, policy.backend)
    return result


@torch.library.custom_op("mainspring::combine", mutates_args=())
def combine_op(
    rows: Tensor,
    weights: Tensor,
    places: Tensor,
    order: Tensor,
    needs_grad: bool,
    numerics: str,
    backend: str | None,
) -> Tensor:
    """rows: [T · k, H], weights, places: [T, k] -> [T, H]; order, the slot of each row, is for the gradient."""
    from mainspring.ops.routing import COMBINE

    with torch.no_grad():
        return COMBINE.select(rows, policy_of(numerics, backend), needs_grad)(rows, weights, places)


@combine_op.register_fake
def _(rows: Tensor, weights: Tensor, places: Tensor, *_: Any) -> Tensor:
    return rows.new_empty((places.shape[0], rows.shape[1]))


@torch.library.custom_op("mainspring::combine_backward", mutates_args=())
def combine_backward_op(
    rows: Tensor, weights: Tensor, order: Tensor, grad: Tensor, numerics: str, backend: str | None
) -> tuple[Tensor, Tensor]:
    """(gradient of rows, gradient of weights)."""
    from mainspring.ops.routing import COMBINE_BACKWARD

    return COMBINE_BACKWARD.select(rows, policy_of(numerics, backend))(
        rows, weights, order, grad.contiguous()
    )


@combine_backward_op.register_fake
def _(rows: Tensor, weights: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), weights.new_empty(weights.shape)


def _combine_keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weights, _, order, _, ctx.numerics, ctx.backend = inputs
    ctx.save_for_backward(rows, weights, order)


def _combine_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = combine_backward_op(*ctx.saved_tensors, grad, ctx.numerics, ctx.backend)
    return (*grads, None, None, None, None, None)


combine_op.register_autograd(_combine_gradient, setup_context=_combine_keep)
