"""RMS normalisation (Zhang and Sennrich, arXiv 1910.07467), alone and fused with a residual addition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mainspring.ops import library
from mainspring.ops.checks import check_norm, described, reject
from mainspring.ops.cpu import norm as cpu
from mainspring.ops.cpu.support import refuses
from mainspring.ops.policy import LOCKSTEP, Policy
from mainspring.ops.precision import accumulator
from mainspring.ops.registry import Implementation, Operation, accepts_floats, any_requires_grad
from mainspring.ops.triton.support import refuses as triton_refuses

# (x, weight, eps, gradient of the norm, gradient of x itself or None) -> (gradient of x, gradient of weight)
Gradient = Callable[[Tensor, Tensor, float, Tensor, Tensor | None], tuple[Tensor, Tensor]]


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, policy: Policy = LOCKSTEP) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last axis. x: [..., H], weight: [H] -> [..., H].

    Normalised in fp32, rounded to x's dtype, then scaled: the order of operations of Hugging Face's Llama.
    """
    if library.is_traced():
        return library.rms_norm(x, weight, eps, policy)
    return RMS_NORM.select(x, policy, any_requires_grad(x, weight))(x, weight, eps, policy)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, policy: Policy = LOCKSTEP
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual); x, residual: [M, H], weight: [H]."""
    if library.is_traced():
        return library.add_rms_norm(x, residual, weight, eps, policy)
    run = ADD_RMS_NORM.select(x, policy, any_requires_grad(x, residual, weight))
    return run(x, residual, weight, eps, policy)


def reference(x: Tensor, weight: Tensor, eps: float, policy: Policy) -> Tensor:
    """The formula. Raises BackendError where weight does not fit x."""
    check_norm("rms_norm", x, weight, eps)
    if policy.numerics == "lockstep":
        return _formula(x, weight, eps, _tree_mean)
    return _with_gradient(_fast_norm, gradient_reference, x, weight, eps)


def add_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, policy: Policy
) -> tuple[Tensor, Tensor]:
    """The formula. Raises BackendError where residual or weight do not fit x."""
    check_norm("add_rms_norm", x, weight, eps)
    if (
        x.dim() != 2
        or residual.shape != x.shape
        or residual.dtype is not x.dtype
        or residual.device != x.device
    ):
        raise reject(
            "add_rms_norm", f"x {described(x)} and residual {described(residual)} must both be [M, H]"
        )
    if policy.numerics == "lockstep":
        total = x + residual
        return _formula(total, weight, eps, _tree_mean), total
    return _add_with_gradient(_fast_add_norm, gradient_reference, x, residual, weight, eps)


def gradient_reference(
    x: Tensor, weight: Tensor, eps: float, grad: Tensor, grad_x: Tensor | None
) -> tuple[Tensor, Tensor]:
    """d x = s · (d n - n · mean(d n · n)) + grad_x, d weight = sum(grad · n); n = s · x, d n = grad · weight.

    By hand it takes half the passes over memory that autograd's does, and only x is kept for it.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=accumulator(x.dtype))
    scale = torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(eps))
    normed = (x * scale).to(x.dtype)
    d_weight = (grad * normed).flatten(0, -2).sum(0)
    d_normed = grad * weight
    overlap = (d_normed * normed).mean(-1, keepdim=True)
    d_x = d_normed.addcmul_(normed, overlap, value=-1.0).mul_(scale.to(x.dtype))
    return d_x if grad_x is None else d_x.add_(grad_x), d_weight


def _formula(x: Tensor, weight: Tensor, eps: float, mean: Callable[[Tensor], Tensor]) -> Tensor:
    wide = x.to(accumulator(x.dtype))
    return weight * (wide * torch.rsqrt(mean(wide * wide) + eps)).to(x.dtype)


def _fast_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _formula(x, weight, eps, lambda square: square.mean(-1, keepdim=True))


def _fast_add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _fast_norm(total, weight, eps), total


def _tree_mean(x: Tensor) -> Tensor:
    """Mean over the last axis by halving: elementwise additions only, so no batch shape can change its bits."""
    size = x.shape[-1]
    width = 1 << (size - 1).bit_length()
    x = F.pad(x, (0, width - size))
    while width > 1:
        width //= 2
        x = x[..., :width] + x[..., width:]
    return x / size


def _with_gradient(
    kernel: Callable[[Tensor, Tensor, float], Tensor],
    gradient: Gradient,
    x: Tensor,
    weight: Tensor,
    eps: float,
) -> Tensor:
    """kernel(x, weight, eps); where a gradient is recorded it is `gradient`'s."""
    if not any_requires_grad(x, weight):
        return kernel(x, weight, eps)
    result: Tensor = _RmsNorm.apply(kernel, gradient, x, weight, eps)
    return result


def _add_with_gradient(
    kernel: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]],
    gradient: Gradient,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """kernel(x, residual, weight, eps); where a gradient is recorded it is `gradient`'s."""
    if not any_requires_grad(x, residual, weight):
        return kernel(x, residual, weight, eps)
    result: tuple[Tensor, Tensor] = _AddRmsNorm.apply(kernel, gradient, x, residual, weight, eps)
    return result


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Any, gradient: Gradient, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.gradient, ctx.eps = gradient, eps
        out: Tensor = kernel(x, weight, eps)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return None, None, *ctx.gradient(x, weight, ctx.eps, grad, None), None


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernel: Any, gradient: Gradient, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        normed, total = kernel(x, residual, weight, eps)
        ctx.save_for_backward(total, weight)
        ctx.gradient, ctx.eps = gradient, eps
        return normed, total

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        d_total, d_weight = ctx.gradient(total, weight, ctx.eps, grad, grad_total)
        return None, None, d_total, d_total, d_weight, None


def _cpu(x: Tensor, weight: Tensor, eps: float, policy: Policy) -> Tensor:
    return _with_gradient(cpu.rms_norm, gradient_reference, x, weight, eps)


def _cpu_add(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, policy: Policy
) -> tuple[Tensor, Tensor]:
    return _add_with_gradient(cpu.add_rms_norm, gradient_reference, x, residual, weight, eps)


def _triton(x: Tensor, weight: Tensor, eps: float, policy: Policy) -> Tensor:
    from mainspring.ops.triton import norm as triton

    return _with_gradient(triton.rms_norm, _triton_gradient, x, weight, eps)


def _triton_add(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, policy: Policy
) -> tuple[Tensor, Tensor]:
    from mainspring.ops.triton import norm as triton

    return _add_with_gradient(triton.add_rms_norm, _triton_gradient, x, residual, weight, eps)


def _triton_gradient(
    x: Tensor, weight: Tensor, eps: float, grad: Tensor, grad_x: Tensor | None
) -> tuple[Tensor, Tensor]:
    from mainspring.ops.triton import norm as triton

    return triton.rms_norm_backward(x, weight, eps, grad, grad_x)


RMS_NORM = Operation(
    "rms_norm",
    Implementation("cpu", _cpu, refuses),
    Implementation("triton", _triton, triton_refuses),
    Implementation("reference", reference, accepts_floats),
)
ADD_RMS_NORM = Operation(
    "add_rms_norm",
    Implementation("cpu", _cpu_add, refuses),
    Implementation("triton", _triton_add, triton_refuses),
    Implementation("reference", add_reference, accepts_floats),
)
RMS_NORM_BACKWARD = Operation(
    "rms_norm_backward",
    Implementation("cpu", gradient_reference, refuses),
    Implementation("triton", _triton_gradient, triton_refuses),
    Implementation("reference", gradient_reference, accepts_floats),
)
