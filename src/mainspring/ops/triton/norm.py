"""RMSNorm, alone or fused with the residual addition, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mainspring.ops.checks import reject
from mainspring.ops.triton.support import (
    canonical_rows,
    check_dtype,
    has_dependent_launch,
    has_tma,
    multiprocessors,
    on_device,
    require,
)

MAX_WIDTH = 32768
_BLOCK_ELEMENTS = 2048  # short rows share a program
_SUM_COLUMNS = 32


@triton.jit(do_not_specialize=["rows", "inner"])
def rms_norm_kernel(
    x, residual, weight, out, total_out, rows, inner, outer_stride, inner_stride, eps,
    H: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Row r of x lies at (r // inner) · outer_stride + (r % inner) · inner_stride; the others are contiguous."""
    # The kernel behind may be brought up; it waits for all of this one, as this one for those ahead.
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
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


@triton.jit
def _add_pairs(a0, b0, a1, b1):
    return a0 + a1, b0 + b1


@triton.jit(do_not_specialize=["rows"])
def rms_norm_backward_kernel(
    x, weight, grad, grad_total, grad_x, grad_weight, rows, eps,
    H: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """grad_weight: [programs, H] fp32, a partial sum each; everything is contiguous [rows, H].

    Rows wait for two sums over them; STAGES - 1 further rows are on their way meanwhile. Both sums are taken at once:
    that of the gradient with the normed row is that with the row itself, scaled.
    """
    columns = tl.arange(0, BLOCK)
    factor = tl.load(weight + columns, columns < H, 0.0).to(tl.float32)[None, :]
    grad_factor = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in tl.range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (columns < H)[None, :]
        index = row.to(tl.int64)[:, None] * H + columns[None, :]
        value = tl.load(x + index, inside, 0.0).to(tl.float32)
        g = tl.load(grad + index, inside, 0.0).to(tl.float32)
        weighted = g * factor
        square, overlap = tl.reduce((value * value, weighted * value), 1, _add_pairs)
        scale = tl.rsqrt(square / H + eps)
        share = (overlap * scale / H)[:, None]
        normed = value * scale[:, None]
        grad_factor += g * normed
        result = (weighted - normed * share) * scale[:, None]
        if ADD:
            result += tl.load(grad_total + index, inside, 0.0).to(tl.float32)
        tl.store(grad_x + index, result.to(grad_x.dtype.element_ty), inside)
    target = grad_weight + tl.program_id(0).to(tl.int64) * H + columns
    tl.store(target, tl.sum(grad_factor, 0), columns < H)


@triton.jit(do_not_specialize=["count"])
def column_sum_kernel(partial, out, count, H: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out[j] = the sum of partial[:, j] in a fixed order. partial: [count, H] fp32."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, count, ROWS):
        inside = (first + row < count)[:, None] & (columns < H)[None, :]
        total += tl.load(partial + (first + row)[:, None] * H + columns[None, :], inside, 0.0)
    tl.store(out + columns, tl.sum(total, 0).to(out.dtype.element_ty), columns < H)


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
    _check("rms_norm", x, weight, eps)
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
    _check("add_rms_norm", x, weight, eps)
    require(
        "add_rms_norm",
        x.dim() == 2
        and residual.shape == x.shape
        and residual.dtype is x.dtype
        and residual.device == x.device,
        f"residual must be {tuple(x.shape)} of {x.dtype} on {x.device}, not {tuple(residual.shape)} of "
        f"{residual.dtype} on {residual.device}",
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
    shape = _backward_shape(h, 2 if grad_total is None else 3, x.element_size(), x.device)
    programs = min(triton.cdiv(rows, shape.rows), shape.programs * multiprocessors(x.device))
    partial = torch.empty((programs, h), dtype=torch.float32, device=x.device)
    grad_weight = torch.empty_like(weight)
    with on_device(x):
        rms_norm_backward_kernel[(programs,)](
            x, weight, grad, grad if grad_total is None else grad_total.contiguous(), grad_x, partial, rows, eps,
            H=h, BLOCK=shape.block, ROWS=shape.rows, ADD=grad_total is not None, STAGES=shape.stages,
            num_warps=shape.warps,
        )  # fmt: skip
        column_sum_kernel[(triton.cdiv(h, _SUM_COLUMNS),)](
            partial, grad_weight, programs, H=h, ROWS=_SUM_COLUMNS, COLUMNS=_SUM_COLUMNS, num_warps=4
        )
    return grad_x, grad_weight


def _check(operation: str, x: Tensor, weight: Tensor, eps: float) -> None:
    check_dtype(operation, x)
    require(operation, x.dim() > 0, "x must have 2 or 3 dimensions, not ()")
    h = x.shape[-1]
    require(
        operation,
        weight.shape == (h,) and weight.dtype is x.dtype and weight.device == x.device,
        f"weight must be [{h}] of {x.dtype} on {x.device}, not {tuple(weight.shape)} of {weight.dtype} on "
        f"{weight.device}",
    )
    require(operation, eps >= 0, f"eps must be at least 0, not {eps}")
    require(operation, 0 < h <= MAX_WIDTH, f"rows of 1 to {MAX_WIDTH} elements are supported, not {h}")


def row_shape(h: int) -> tuple[int, int, int]:
    """(rows of a program, elements of a padded row, warps): a function of H alone, as is the order of the sum."""
    block = triton.next_power_of_2(h)
    warps = 4 if block <= 2048 else 8 if block <= 8192 else 16
    return max(1, _BLOCK_ELEMENTS // block), block, warps


@dataclass(frozen=True)
class _BackwardShape:
    """rows, block: of a program's step, warps; stages: steps that are loaded at once; programs: a multiprocessor."""

    rows: int
    block: int
    warps: int
    stages: int
    programs: int


def _backward_shape(h: int, tensors: int, size: int, device: torch.device) -> _BackwardShape:
    """What an H200 found fastest; the order of these sums need not follow from H alone.

    tensors: that are loaded, of elements of `size` bytes.
    """
    rows, block, warps = row_shape(h)
    stages = 4
    if block <= 1024:
        stages = 3
    elif block == 4096 and tensors == 2:
        rows, stages = 2, 3
    budget = 160 << 10 if has_tma(device) else 80 << 10
    stages = max(1, min(stages, 1 + budget // (rows * block * tensors * size)))
    return _BackwardShape(rows, block, warps, stages, 3 if block <= 1024 else 2 if block <= 2048 else 1)


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
    per_program, block, warps = row_shape(h)
    early = has_dependent_launch(x.device)
    with on_device(x):
        rms_norm_kernel[(triton.cdiv(rows, per_program),)](
            x, x if residual is None else residual, canonical_rows(weight), out, total, rows, inner, outer_stride,
            inner_stride, eps, H=h, BLOCK=block, ROWS=per_program, ADD=residual is not None, EARLY=early,
            num_warps=warps, launch_pdl=early,
        )  # fmt: skip
