"""RMSNorm, alone or fused with the residual addition (csrc/kernels/norm.cpp)."""

from __future__ import annotations

import torch

from mainspring.ops.checks import reject
from mainspring.ops.cpu.extension import dtype_code, require_kernels


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`round(x * rsqrt(mean(x^2) + eps)) * weight` over the last dimension, as Hugging Face's Llama rounds it.

    Args:
        x: [M, H] or [T, heads, H], float32 or bfloat16; rows may be strided, the last dimension is contiguous.
        weight: [H] in x's dtype.
        eps: added to the mean of squares.

    Returns:
        x's shape and dtype, contiguous.

    Raises:
        BackendError: a device, dtype, shape or layout that the kernel does not take.
    """
    shape = x.shape
    if len(shape) == 2:
        outer, h = shape
        inner, inner_stride = 1, 0
        outer_stride, step = x.stride()
    elif len(shape) == 3:
        outer, inner, h = shape
        outer_stride, inner_stride, step = x.stride()
    else:
        raise reject("rms_norm", f"x must have 2 or 3 dimensions, not {tuple(shape)}")
    code = _check("rms_norm", x, weight, h, step, eps)
    out = torch.empty_like(x) if x.is_contiguous() else x.new_empty(shape)  # the former is quicker
    require_kernels().rms_norm(
        x.data_ptr(),
        outer_stride,
        inner_stride,
        0,
        weight.data_ptr(),
        out.data_ptr(),
        0,
        outer,
        inner,
        h,
        eps,
        code,
    )
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds the residual, rounds the sum to the dtype, and normalises what was rounded.

    Args:
        x: [M, H] float32 or bfloat16, last dimension contiguous.
        residual: [M, H] in x's dtype, contiguous.
        weight: [H] in x's dtype.
        eps: added to the mean of squares.

    Returns:
        (normed [M, H], new residual [M, H]).

    Raises:
        BackendError: a device, dtype, shape or layout that the kernel does not take.
    """
    if x.dim() != 2:
        raise reject("add_rms_norm", f"x must be [M, H], not {tuple(x.shape)}")
    m, h = x.shape
    stride, step = x.stride()
    code = _check("add_rms_norm", x, weight, h, step, eps)
    if (
        residual.dtype is not x.dtype
        or residual.shape != x.shape
        or not (residual.is_contiguous() and residual.is_cpu)
    ):
        raise reject(
            "add_rms_norm",
            f"residual must be a contiguous {tuple(x.shape)} of {x.dtype}, "
            f"not {tuple(residual.shape)} of {residual.dtype}",
        )
    out = torch.empty_like(residual)
    total = torch.empty_like(residual)
    require_kernels().rms_norm(
        x.data_ptr(), stride, 0, residual.data_ptr(), weight.data_ptr(), out.data_ptr(), total.data_ptr(), m, 1, h,
        eps, code,
    )  # fmt: skip
    return out, total


def _check(operation: str, x: torch.Tensor, weight: torch.Tensor, h: int, step: int, eps: float) -> int:
    code = dtype_code(operation, x)
    if weight.dtype is not x.dtype or not weight.is_cpu or weight.shape != (h,) or not weight.is_contiguous():
        raise reject(
            operation,
            f"weight must be a contiguous [{h}] of {x.dtype} on the CPU, "
            f"not {tuple(weight.shape)} of {weight.dtype} on {weight.device}",
        )
    if not eps >= 0:
        raise reject(operation, f"eps must be at least 0, not {eps}")
    if step != 1 and h > 1:
        raise reject(operation, "the last dimension of x must be contiguous; call .contiguous()")
    return code
