"""RMSNorm, alone or fused with the residual addition, forward and backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mainspring.ops.triton.support import (
    canonical_rows,
    check_dtype,
    multiprocessors,
    on_device,
    reject,
    require,
)

MAX_WIDTH = 32768
_BLOCK_ELEMENTS = 2048  # short rows share a program


@triton.jit(do_not_specialize=["rows", "inner"])
def rms_norm_kernel(
    x, residual, weight, out, total_out, rows, inner, outer_stride, inner_stride, eps,
    H: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Row r of x lies at (r // inner) · outer_stride + (r % inner) · inner_stride; the others are contiguous."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (columns < H)[None, :]
    source = (row // inner) * outer_stride + (row % inner) * inner_stride
    value = tl.load(x + source[:, None] + columns[None, :], inside, 0.0).to(tl.float32)
    index = row[:, None] * H + columns[None, :]
    if ADD:
        value += tl.load(residual + index, inside, 0.0).to(tl.float32)
        total = value.to(out.dtype.element_ty)
        tl.store(total_out + index, total, inside)
        value = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1) / H + eps)
    normed = (value * scale[:, None]).to(out.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + columns, columns < H, 0.0).to(tl.float32)
    tl.store(out + index, (normed * factor[None, :]).to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_backward_kernel(
    x, weight, grad, grad_total, grad_x, grad_weight, rows, eps,
    H: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """grad_weight: [programs, H] fp32, a partial sum each; everything is contiguous [rows, H]."""
    columns = tl.arange(0, BLOCK)
    factor = tl.load(weight + columns, columns < H, 0.0).to(tl.float32)[None, :]
    grad_factor = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (columns < H)[None, :]
        index = row.to(tl.int64)[:, None] * H + columns[None, :]
        value = tl.load(x + index, inside, 0.0).to(tl.float32)
        g = tl.load(grad + index, inside, 0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(value * value, 1) / H + eps)[:, None]
        normed = value * scale
        grad_factor += g * normed
        g *= factor
        result = (g - normed * (tl.sum(g * normed, 1) / H)[:, None]) * scale
        if ADD:
            result += tl.load(grad_total + index, inside, 0.0).to(tl.float32)
        tl.store(grad_x + index, result.to(grad_x.dtype.element_ty), inside)
    target = grad_weight + tl.program_id(0).to(tl.int64) * H + columns
    tl.store(target, tl.sum(grad_factor, 0), columns < H)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`round(x * rsqrt(mean(x^2) + eps)) * weight` over the last dimension, as Hugging Face's Llama rounds it.

    Args:
        x: [M, H] or [T, heads, H], float32, bfloat16 or float16.
        weight: [H] in x's dtype.
        eps: added to the mean of squares.

    Returns:
        x's shape and dtype, contiguous.

    Raises:
        BackendError: a dtype or shape that the kernel does not take.
    """
    _check("rms_norm", x, weight)
    if x.dim() not in (2, 3):
        raise reject("rms_norm", f"x must have 2 or 3 dimensions, not {tuple(x.shape)}")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _forward(x, None, weight, out, out, eps)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Adds the residual, rounds the sum to the dtype, and normalises what was rounded.

    Args:
        x: [M, H] float32, bfloat16 or float16.
        residual: [M, H] in x's dtype.
        weight: [H] in x's dtype.
        eps: added to the mean of squares.

    Returns:
        (normed [M, H], new residual [M, H]).

    Raises:
        BackendError: a dtype or shape that the kernel does not take.
    """
    _check("add_rms_norm", x, weight)
    require(
        "add_rms_norm",
        x.dim() == 2 and residual.shape == x.shape and residual.dtype is x.dtype,
        f"residual must be {tuple(x.shape)} of {x.dtype}, not {tuple(residual.shape)} of {residual.dtype}",
    )
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    residual = residual.contiguous()
    _forward(x, canonical_rows(residual), weight, out, total, eps)
    return out, total


def rms_norm_backward(
    x: Tensor, weight: Tensor, eps: float, grad: Tensor, grad_total: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(gradient of x, gradient of weight) of rms_norm; with grad_total those of add_rms_norm, x being the sum.

    Args:
        x: [..., H], what was normalised.
        weight: [H].
        eps: that of the forward pass.
        grad: gradient of the normed output, x's shape.
        grad_total: gradient of the sum itself, x's shape, or None.

    Returns:
        ([..., H] in x's dtype, [H] in weight's dtype).
    """
    h = x.shape[-1]
    rows = x.numel() // h if h else 0
    x, grad = x.contiguous(), grad.contiguous()
    grad_x = torch.empty_like(x)
    if rows == 0:
        return grad_x, torch.zeros_like(weight)
    per_program, block, warps = _shape(h)
    programs = min(triton.cdiv(rows, per_program), 4 * multiprocessors(x.device))
    partial = torch.empty((programs, h), dtype=torch.float32, device=x.device)
    with on_device(x):
        rms_norm_backward_kernel[(programs,)](
            x, weight, grad, grad if grad_total is None else grad_total.contiguous(), grad_x, partial, rows, eps,
            H=h, BLOCK=block, ROWS=per_program, ADD=grad_total is not None, num_warps=warps,
        )  # fmt: skip
    return grad_x, partial.sum(0).to(weight.dtype)


def _check(operation: str, x: Tensor, weight: Tensor) -> None:
    check_dtype(operation, x)
    h = x.shape[-1]
    require(
        operation,
        weight.shape == (h,) and weight.dtype is x.dtype,
        f"weight must be [{h}] of {x.dtype}, not {tuple(weight.shape)} of {weight.dtype}",
    )
    require(operation, 0 < h <= MAX_WIDTH, f"rows of 1 to {MAX_WIDTH} elements are supported, not {h}")


def _shape(h: int) -> tuple[int, int, int]:
    """(rows of a program, elements of a padded row, warps): a function of H alone, as is the order of the sum."""
    block = triton.next_power_of_2(h)
    warps = 4 if block <= 2048 else 8 if block <= 8192 else 16
    return max(1, _BLOCK_ELEMENTS // block), block, warps


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, out: Tensor, total: Tensor, eps: float
) -> None:
    x = canonical_rows(x)
    h = x.shape[-1]
    inner = x.shape[1] if x.dim() == 3 else 1
    rows = x.shape[0] * inner
    if rows == 0:
        return
    # A dimension of size 1 may have any stride, and the kernel is compiled for what divides a stride.
    inner_stride = x.stride(1) if x.dim() == 3 and inner > 1 else h
    outer_stride = x.stride(0) if x.shape[0] > 1 else inner * h
    per_program, block, warps = _shape(h)
    with on_device(x):
        rms_norm_kernel[(triton.cdiv(rows, per_program),)](
            x, x if residual is None else residual, canonical_rows(weight), out, total, rows, inner, outer_stride,
            inner_stride, eps, H=h, BLOCK=block, ROWS=per_program, ADD=residual is not None, num_warps=warps,
        )  # fmt: skip
