"""RMS normalisation (Zhang and Sennrich, arXiv 1910.07467), alone and fused with a residual addition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mainspring.ops.cpu import norm as cpu
from mainspring.ops.cpu.support import refuses
from mainspring.ops.gradient import kernel_with_formula_gradient
from mainspring.ops.policy import FAST, LOCKSTEP, Policy
from mainspring.ops.precision import accumulator
from mainspring.ops.registry import Implementation, Operation, accepts_all, any_requires_grad


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, policy: Policy = LOCKSTEP) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last axis. x: [..., H], weight: [H] -> [..., H].

    Normalised in fp32, rounded to x's dtype, then scaled: the order of operations of Hugging Face's Llama.
    """
    return RMS_NORM.select(x, policy, any_requires_grad(x, weight))(x, weight, eps, policy)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, policy: Policy = LOCKSTEP
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual); x, residual: [M, H], weight: [H]."""
    run = ADD_RMS_NORM.select(x, policy, any_requires_grad(x, residual, weight))
    return run(x, residual, weight, eps, policy)


def reference(x: Tensor, weight: Tensor, eps: float, policy: Policy) -> Tensor:
    wide = x.to(accumulator(x.dtype))
    square = wide * wide
    mean = square.mean(-1, keepdim=True) if policy.numerics == "fast" else _tree_mean(square)
    return weight * (wide * torch.rsqrt(mean + eps)).to(x.dtype)


def add_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, policy: Policy
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return reference(total, weight, eps, policy), total


def _tree_mean(x: Tensor) -> Tensor:
    """Mean over the last axis by halving: elementwise additions only, so no batch shape can change its bits."""
    size = x.shape[-1]
    width = 1 << (size - 1).bit_length()
    x = F.pad(x, (0, width - size))
    while width > 1:
        width //= 2
        x = x[..., :width] + x[..., width:]
    return x / size


def _cpu(x: Tensor, weight: Tensor, eps: float, policy: Policy) -> Tensor:
    if not any_requires_grad(x, weight):
        return cpu.rms_norm(x, weight, eps)
    result: Tensor = kernel_with_formula_gradient(
        lambda a, w: cpu.rms_norm(a, w, eps), lambda a, w: reference(a, w, eps, FAST), x, weight
    )
    return result


def _cpu_add(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, policy: Policy
) -> tuple[Tensor, Tensor]:
    if not any_requires_grad(x, residual, weight):
        return cpu.add_rms_norm(x, residual, weight, eps)
    result: tuple[Tensor, Tensor] = kernel_with_formula_gradient(
        lambda a, r, w: cpu.add_rms_norm(a, r, w, eps),
        lambda a, r, w: add_reference(a, r, w, eps, FAST),
        x,
        residual,
        weight,
    )
    return result


RMS_NORM = Operation(
    "rms_norm",
    Implementation("cpu", _cpu, refuses),
    Implementation("reference", reference, accepts_all),
)
ADD_RMS_NORM = Operation(
    "add_rms_norm",
    Implementation("cpu", _cpu_add, refuses),
    Implementation("reference", add_reference, accepts_all),
)
