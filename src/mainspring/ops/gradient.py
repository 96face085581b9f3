"""Gradients for kernels that only know the forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _KernelForward(torch.autograd.Function):
    """Forward by a kernel; backward by differentiating the same formula written in PyTorch."""

    @staticmethod
    def forward(ctx: Any, kernel: Callable[..., Any], formula: Callable[..., Any], *inputs: Tensor) -> Any:
        ctx.formula = formula
        ctx.save_for_backward(*inputs)
        return kernel(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [t.detach().requires_grad_(t.is_floating_point()) for t in ctx.saved_tensors]
        with torch.enable_grad():
            outputs = ctx.formula(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        wanted = [t for t, needed in zip(inputs, ctx.needs_input_grad[2:], strict=True) if needed]
        gradients = iter(torch.autograd.grad(outputs, wanted, grad_outputs, allow_unused=True))
        return (None, None, *(next(gradients) if needed else None for needed in ctx.needs_input_grad[2:]))


def kernel_with_formula_gradient(
    kernel: Callable[..., Any], formula: Callable[..., Any], *inputs: Tensor
) -> Any:
    """kernel(*inputs), whose gradient is that of formula(*inputs).

    The kernel fixes the forward bits (which lockstep needs); the formula is evaluated again in the
    backward pass, so it must compute the same function up to rounding.
    """
    return _KernelForward.apply(kernel, formula, *inputs)
