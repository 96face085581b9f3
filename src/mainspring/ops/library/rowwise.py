"""Norms, SwiGLU and RoPE as PyTorch operators."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mainspring.ops.library.support import policy_of
from mainspring.ops.policy import Policy
from mainspring.ops.registry import any_requires_grad

if TYPE_CHECKING:
    from mainspring.ops.rope import RopeAngles


# ---- RMS norm ------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float, policy: Policy) -> Tensor:
    """ops.norm.rms_norm as an operator."""
    needs_grad = any_requires_grad(x, weight)
    result: Tensor = rms_norm_op(x, weight, eps, needs_grad, policy.numerics, policy.backend)
    return result


@torch.library.custom_op("mainspring::rms_norm", mutates_args=())
def rms_norm_op(
    x: Tensor, weight: Tensor, eps: float, needs_grad: bool, numerics: str, backend: str | None
) -> Tensor:
    """x: [..., H], weight: [H] -> [..., H]."""
    from mainspring.ops.norm import RMS_NORM

    policy = policy_of(numerics, backend)
    with torch.no_grad():
        return RMS_NORM.select(x, policy, needs_grad)(x, weight, eps, policy)


@rms_norm_op.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, policy: Policy
) -> tuple[Tensor, Tensor]:
    """ops.norm.add_rms_norm as an operator."""
    result: tuple[Tensor, Tensor] = add_rms_norm_op(
        x, residual, weight, eps, any_requires_grad(x, residual, weight), policy.numerics, policy.backend
    )
    return result


@torch.library.custom_op("mainspring::add_rms_norm", mutates_args=())
def add_rms_norm_op(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    needs_grad: bool,
    numerics: str,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """x, residual: [M, H], weight: [H] -> (the norm, the sum), [M, H] each."""
    from mainspring.ops.norm import ADD_RMS_NORM

    policy = policy_of(numerics, backend)
    with torch.no_grad():
        return ADD_RMS_NORM.select(x, policy, needs_grad)(x, residual, weight, eps, policy)


@add_rms_norm_op.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    like = torch.contiguous_format
    return torch.empty_like(x, memory_format=like), torch.empty_like(x, memory_format=like)


@torch.library.custom_op("mainspring::rms_norm_backward", mutates_args=())
def rms_norm_backward_op(
    x: Tensor,
    weight: Tensor,
    eps: float,
    grad: Tensor,
    grad_x: Tensor | None,
    numerics: str,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """(gradient of x, gradient of weight); grad_x is what comes to x by another way."""
    from mainspring.ops.norm import RMS_NORM_BACKWARD

    run = RMS_NORM_BACKWARD.select(x, policy_of(numerics, backend))
    return run(x, weight, eps, grad.contiguous(), None if grad_x is None else grad_x.contiguous())


@rms_norm_backward_op.register_fake
def _(x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight)


def _norm_keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps, _, ctx.numerics, ctx.backend = inputs
    ctx.save_for_backward(x, weight)


def _norm_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    grads = rms_norm_backward_op(x, weight, ctx.eps, grad, None, ctx.numerics, ctx.backend)
    return (*grads, None, None, None, None)


def _add_norm_keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _x, _residual, weight, ctx.eps, _, ctx.numerics, ctx.backend = inputs
    ctx.save_for_backward(output[1], weight)


def _add_norm_gradient(ctx: Any, grad: Tensor, grad_total: Tensor) -> tuple[Tensor | None, ...]:
    total, weight = ctx.saved_tensors
    d_total, d_weight = rms_norm_backward_op(
        total, weight, ctx.eps, grad, grad_total, ctx.numerics, ctx.backend
    )
    return d_total, d_total.clone(), d_weight, None, None, None, None


rms_norm_op.register_autograd(_norm_gradient, setup_context=_norm_keep)
add_rms_norm_op.register_autograd(_add_norm_gradient, setup_context=_add_norm_keep)


# ---- SwiGLU --------------------------------------------------------------------------------------------------------


def swiglu(gate_up: Tensor, policy: Policy) -> Tensor:
    """ops.swiglu.swiglu as an operator."""
    result: Tensor = swiglu_op(gate_up, any_requires_grad(gate_up), policy.numerics, policy.backend)
    return result


@torch.library.custom_op("mainspring::swiglu", mutates_args=())
def swiglu_op(gate_up: Tensor, needs_grad: bool, numerics: str, backend: str | None) -> Tensor:
    """[M, 2 · I] -> [M, I]."""
    from mainspring.ops.swiglu import SWIGLU

    policy = policy_of(numerics, backend)
    with torch.no_grad():
        return SWIGLU.select(gate_up, policy, needs_grad)(gate_up, policy)


@swiglu_op.register_fake
def _(gate_up: Tensor, *_: Any) -> Tensor:
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))


@torch.library.custom_op("mainspring::swiglu_backward", mutates_args=())
def swiglu_backward_op(gate_up: Tensor, grad: Tensor, numerics: str, backend: str | None) -> Tensor:
    """The gradient of gate_up, [M, 2 · I]."""
    from mainspring.ops.swiglu import SWIGLU_BACKWARD

    return SWIGLU_BACKWARD.select(gate_up, policy_of(numerics, backend))(gate_up, grad.contiguous())


@swiglu_backward_op.register_fake
def _(gate_up: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(gate_up, memory_format=torch.contiguous_format)


def _swiglu_keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate_up, _, ctx.numerics, ctx.backend = inputs
    ctx.save_for_backward(gate_up)


def _swiglu_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return swiglu_backward_op(ctx.saved_tensors[0], grad, ctx.numerics, ctx.backend), None, None, None


swiglu_op.register_autograd(_swiglu_gradient, setup_context=_swiglu_keep)


# ---- RoPE ----------------------------------------------------------------------------------------------------------


def rope(
    q: Tensor, k: Tensor, angles: RopeAngles, interleaved: bool, policy: Policy
) -> tuple[Tensor, Tensor]:
    """ops.rope.rope as an operator."""
    result: tuple[Tensor, Tensor] = rope_op(
        q, k, angles.positions, angles.inv_freq, angles.rows, angles.scale, interleaved,
        any_requires_grad(q, k), policy.numerics, policy.backend,
    )  # fmt: skip
    return result


@torch.library.custom_op("mainspring::rope", mutates_args=())
def rope_op(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    rows: Tensor | None,
    scale: float,
    interleaved: bool,
    needs_grad: bool,
    numerics: str,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """q: [T, Hq, D], k: [T, Hkv, D], rotated into new tensors."""
    from mainspring.ops.rope import ROPE, RopeAngles

    q, k = (x.clone(memory_format=torch.contiguous_format) for x in (q, k))  # which may be overwritten
    policy = policy_of(numerics, backend)
    with torch.no_grad():
        run = ROPE.select(q, policy, needs_grad)
        return run(q, k, RopeAngles(positions, inv_freq, rows, scale), interleaved, policy)


@rope_op.register_fake
def _(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    like = torch.contiguous_format
    return torch.empty_like(q, memory_format=like), torch.empty_like(k, memory_format=like)


def _rope_keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _q, _k, positions, inv_freq, rows, *ctx.options = inputs
    ctx.save_for_backward(positions, inv_freq, rows)


def _rope_gradient(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    """The rotation back: cosines are even and sines odd in the frequencies."""
    positions, inv_freq, rows = ctx.saved_tensors
    grads = rope_op(grad_q, grad_k, positions, -inv_freq, rows, *ctx.options)
    return (*grads, *(None,) * 8)


rope_op.register_autograd(_rope_gradient, setup_context=_rope_keep)
