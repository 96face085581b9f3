"""One linear layer per expert in one launch: rows sorted by expert, offsets on the device, no host sync.

A block finds the expert of each of its tiles from the offsets. A row's sum over K is the one of `linear` with its
expert's weight: the same chunks, the same chain of products.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mainspring.ops.triton.linear import Tile, k_chunk
from mainspring.ops.triton.support import (
    aligned,
    check_dtype,
    has_tma,
    multiprocessors,
    on_device,
    require,
)

MAX_EXPERTS = 1024
WIDE = Tile(128, 256, 64, 8, 4)
SQUARE = Tile(128, 128, 64, 8, 4)
SMALL = Tile(64, 128, 64, 4, 5)
GRADIENT = Tile(128, 256, 64, 8, 3)  # of dW: rows and columns of a weight, and a step of tokens
FP32 = Tile(64, 64, 16, 4, 2)


@triton.jit
def _row_tiles(offsets, experts, total, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """Tiles of rows of each expert, [EXPERTS]. No offset leads out of the tensors' `total` rows."""
    index = tl.arange(0, EXPERTS)
    first = tl.minimum(tl.load(offsets + index, index < experts, 0), total)
    end = tl.minimum(tl.load(offsets + index + 1, index < experts, 0), total)
    return tl.cdiv(tl.maximum(end - first, 0), ROWS)


@triton.jit
def _expert_of(slot, offsets, experts, total, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """(expert, first row, end of the expert's rows) of a tile of rows."""
    tiles = _row_tiles(offsets, experts, total, ROWS, EXPERTS)
    expert = tl.sum((tl.cumsum(tiles, 0) <= slot).to(tl.int32), 0)
    before = tl.sum(tl.where(tl.arange(0, EXPERTS) < expert, tiles, 0), 0)
    end = tl.minimum(tl.load(offsets + expert + 1), total)
    return expert, tl.load(offsets + expert) + (slot - before) * ROWS, end


@triton.jit
def _load_x(
    x, index, row, end, k, depth, stride,
    ROWS: tl.constexpr, STEP: tl.constexpr, GATHER: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    if TMA and not GATHER:
        value = x.load([row, k])
    else:
        rows = row + tl.arange(0, ROWS)
        inside = rows < end
        source = tl.load(index + rows, inside, 0).to(tl.int64) if GATHER else rows.to(tl.int64)
        ks = k + tl.arange(0, STEP)
        value = tl.load(
            x + source[:, None] * stride + ks[None, :], inside[:, None] & (ks[None, :] < depth), 0.0
        )
    return value


@triton.jit
def _load_w(
    w, expert, column, k, n, depth,
    COLUMNS: tl.constexpr, STEP: tl.constexpr, TRANSPOSED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """[STEP, COLUMNS] of an expert's weight, which is stored as [n, depth] or (transposed) as [depth, n]."""
    columns = column + tl.arange(0, COLUMNS)
    ks = k + tl.arange(0, STEP)
    if TMA and TRANSPOSED:
        value = w.load([expert, k, column]).reshape(STEP, COLUMNS)
    elif TMA:
        value = w.load([expert, column, k]).reshape(COLUMNS, STEP).T
    elif TRANSPOSED:
        start = w + expert.to(tl.int64) * n * depth
        inside = (ks[:, None] < depth) & (columns[None, :] < n)
        value = tl.load(start + ks.to(tl.int64)[:, None] * n + columns[None, :], inside, 0.0)
    else:
        start = w + expert.to(tl.int64) * n * depth
        inside = (columns[:, None] < n) & (ks[None, :] < depth)
        value = tl.load(start + columns.to(tl.int64)[:, None] * depth + ks[None, :], inside, 0.0).T
    return value


@triton.jit
def _chain(
    x, w, index, expert, row, end, column, first, last, n, depth, stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, GATHER: tl.constexpr, TRANSPOSED: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(first, last, STEP):
        a = _load_x(x, index, row, end, k, depth, stride, ROWS, STEP, GATHER, TMA)
        b = _load_w(w, expert, column, k, n, depth, COLUMNS, STEP, TRANSPOSED, TMA)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _store_part(
    target,
    out,
    part,
    row,
    end,
    column,
    n,
    whole,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TMA: tl.constexpr,
):
    if TMA:
        if whole:
            target.store([row, column], part.to(target.dtype))
        else:
            _store_masked(out, part, row, end, column, n, ROWS, COLUMNS)
    else:
        _store_masked(out, part, row, end, column, n, ROWS, COLUMNS)


@triton.jit
def _store_masked(out, part, row, end, column, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = row + tl.arange(0, ROWS)
    columns = column + tl.arange(0, COLUMNS)
    inside = (rows[:, None] < end) & (columns[None, :] < n)
    tl.store(out + rows.to(tl.int64)[:, None] * n + columns[None, :], part.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["total"])
def grouped_kernel(
    x, w, index, offsets, target, out, total, experts, n, depth, chunk, stride,
    CHUNKED: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
    GROUP: tl.constexpr, GATHER: tl.constexpr, TRANSPOSED: tl.constexpr, TMA: tl.constexpr, TMA_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Persistent: each block walks over tiles. target: a descriptor of out, for tiles that are all inside."""
    slots = tl.sum(_row_tiles(offsets, experts, total, ROWS, EXPERTS), 0)
    column_tiles = tl.cdiv(n, COLUMNS)
    for tile in tl.range(tl.program_id(0), slots * column_tiles, tl.num_programs(0)):
        band = tile // (GROUP * column_tiles)
        band_slots = min(slots - band * GROUP, GROUP)
        inside = tile % (GROUP * column_tiles)
        expert, row, end = _expert_of(
            band * GROUP + inside % band_slots, offsets, experts, total, ROWS, EXPERTS
        )
        column = inside // band_slots * COLUMNS
        if CHUNKED:
            acc = tl.zeros((ROWS, COLUMNS), tl.float32)
            for first in range(0, depth, chunk):
                acc += _chain(
                    x, w, index, expert, row, end, column, first, min(first + chunk, depth), n, depth, stride,
                    ROWS, COLUMNS, STEP, GATHER, TRANSPOSED, TMA, PRECISION,
                )  # fmt: skip
        else:
            acc = _chain(
                x, w, index, expert, row, end, column, 0, depth, n, depth, stride,
                ROWS, COLUMNS, STEP, GATHER, TRANSPOSED, TMA, PRECISION,
            )  # fmt: skip
        whole = row + ROWS <= end
        # In two halves: what a tile's output takes of shared memory is a stage of the inputs less.
        halves = tl.permute(tl.reshape(acc, (ROWS, 2, COLUMNS // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        _store_part(target, out, left, row, end, column, n, whole, ROWS, COLUMNS // 2, TMA_OUT)
        _store_part(
            target, out, right, row, end, column + COLUMNS // 2, n, whole, ROWS, COLUMNS // 2, TMA_OUT
        )


@triton.jit(do_not_specialize=["total"])
def grouped_weight_kernel(
    x, grad, index, offsets, x_tiles, grad_tiles, out, total, n, depth, x_stride, grad_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
    GROUP: tl.constexpr, GATHER: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[e] = gradᵀ x over the rows of expert e, in their order; a block a tile. x_tiles, grad_tiles: descriptors."""
    row_tiles, column_tiles = tl.cdiv(n, ROWS), tl.cdiv(depth, COLUMNS)
    tile = tl.program_id(0)
    expert = tile // (row_tiles * column_tiles)
    tile = tile % (row_tiles * column_tiles)
    band = tile // (GROUP * column_tiles)
    band_rows = min(row_tiles - band * GROUP, GROUP)
    inside = tile % (GROUP * column_tiles)
    row = (band * GROUP + inside % band_rows) * ROWS
    column = inside // band_rows * COLUMNS
    start = tl.load(offsets + expert)
    end = tl.minimum(tl.load(offsets + expert + 1), total)
    rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    whole = start
    if TMA:
        whole += (end - start) // STEP * STEP
        for token in range(start, whole, STEP):
            a = grad_tiles.load([token, row])
            if GATHER:
                source = tl.load(index + token + tl.arange(0, STEP)).to(tl.int64)
                b = tl.load(
                    x + source[:, None] * x_stride + columns[None, :], (columns < depth)[None, :], 0.0
                )
            else:
                b = x_tiles.load([token, column])
            acc = tl.dot(a.T, b, acc, input_precision=PRECISION)
    for token in range(whole, end, STEP):
        tokens = token + tl.arange(0, STEP)
        known = tokens < end
        source = tl.load(index + tokens, known, 0).to(tl.int64) if GATHER else tokens.to(tl.int64)
        a = tl.load(
            grad + tokens.to(tl.int64)[:, None] * grad_stride + rows[None, :], known[:, None] & (rows < n)[None, :], 0.0
        )  # fmt: skip
        b = tl.load(
            x + source[:, None] * x_stride + columns[None, :],
            known[:, None] & (columns < depth)[None, :],
            0.0,
        )
        acc = tl.dot(a.T, b, acc, input_precision=PRECISION)
    place = out + (expert.to(tl.int64) * n + rows[:, None]) * depth + columns[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), (rows[:, None] < n) & (columns[None, :] < depth))


def _check(operation: str, x: Tensor, offsets: Tensor, index: Tensor | None) -> None:
    check_dtype(operation, x)
    require(
        operation,
        offsets.dtype is torch.int32 and offsets.dim() == 1 and offsets.is_contiguous(),
        f"offsets must be [E + 1] int32, not {tuple(offsets.shape)} of {offsets.dtype}",
    )
    experts = offsets.shape[0] - 1
    require(operation, 1 <= experts <= MAX_EXPERTS, f"takes 1 to {MAX_EXPERTS} experts, not {experts}")
    require(
        operation,
        index is None or (index.dtype is torch.int32 and index.dim() == 1 and index.is_contiguous()),
        "index must be [R] int32",
    )
    require(
        operation,
        offsets.device == x.device and (index is None or index.device == x.device),
        f"offsets and index must lie on {x.device}",
    )


def check(x: Tensor, weight: Tensor, offsets: Tensor, index: Tensor | None, transposed: bool) -> int:
    """N. Raises BackendError for arguments that do not fit each other or the kernels."""
    _check("grouped_linear", x, offsets, index)
    k, experts = x.shape[1], offsets.shape[0] - 1
    require(
        "grouped_linear",
        weight.dtype is x.dtype and weight.dim() == 3 and weight.device == x.device and k > 0
        and weight.shape[0] == experts and weight.shape[1 if transposed else 2] == k,
        f"weight {weight.dtype} {tuple(weight.shape)} does not fit x {x.dtype} {tuple(x.shape)} and {experts} experts",
    )  # fmt: skip
    return weight.shape[2 if transposed else 1]


def check_gradient(x: Tensor, grad: Tensor, offsets: Tensor, index: Tensor | None) -> None:
    """Raises BackendError for arguments that do not fit each other or the kernels."""
    _check("grouped_weight_gradient", x, offsets, index)
    rows = x.shape[0] if index is None else index.shape[0]
    require(
        "grouped_weight_gradient",
        grad.dtype is x.dtype and grad.dim() == 2 and grad.shape[0] == rows,
        f"grad {grad.dtype} {tuple(grad.shape)} must be [{rows}, N] of {x.dtype}",
    )


def _tile(rows: int, experts: int, n: int, dtype: torch.dtype) -> Tile:
    """By rows of an average expert, so that few of a tile's are idle."""
    if dtype == torch.float32:
        return FP32
    if rows <= 64 * experts:
        return SMALL
    idle = [-(-n // t.columns) * t.columns for t in (WIDE, SQUARE)]
    return WIDE if idle[0] <= 1.06 * idle[1] else SQUARE


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    index: Tensor | None = None,
    *,
    transposed: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """Rows offsets[e] to offsets[e + 1] times weight[e]ᵀ; a row's bits are those of `linear` with that weight.

    Args:
        x: [R, K] float32, bfloat16 or float16, rows sorted by expert; with an index any [T, K].
        weight: [E, N, K] in x's dtype; transposed: [E, K, N].
        offsets: [E + 1] int32 on x's device, rising from 0 to R; rows past the last are not written.
        index: [R] int32, the row of x that each row is, or None for its own.
        tile: another tile than the table's (tests and benchmarks); it changes no bit.

    Returns:
        [R, N] in x's dtype.

    Raises:
        BackendError: a dtype, shape or device that the kernel does not take.
    """
    n = check(x, weight, offsets, index, transposed)
    k, experts = x.shape[1], offsets.shape[0] - 1
    rows = x.shape[0] if index is None else index.shape[0]
    out = torch.empty((rows, n), dtype=x.dtype, device=x.device)
    if not rows or not n:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    weight = weight.contiguous()
    tile = tile or _tile(rows, experts, n, x.dtype)
    tma = has_tma(x.device) and x.dtype != torch.float32 and aligned(weight)
    if tma and not aligned(x):
        x = x.clone(memory_format=torch.contiguous_format)
    box = [1, tile.k, tile.columns] if transposed else [1, tile.columns, tile.k]
    tma_out = tma and aligned(out)
    chunk = k if transposed else k_chunk(n, k)
    processors = multiprocessors(x.device)
    blocks_each = max(1, 512 // (tile.warps * 32) // 2)
    tiles = (rows // tile.rows + experts) * triton.cdiv(n, tile.columns)
    constants: dict[str, Any] = {
        "CHUNKED": chunk < k, "EXPERTS": triton.next_power_of_2(experts), "ROWS": tile.rows,
        "COLUMNS": tile.columns, "STEP": tile.k, "GROUP": 8, "GATHER": index is not None,
        "TRANSPOSED": transposed, "TMA": tma, "TMA_OUT": tma_out,
        "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    with on_device(x):
        grouped_kernel[(min(tiles, processors * blocks_each),)](
            TensorDescriptor.from_tensor(x, [tile.rows, tile.k]) if tma and index is None else x,
            TensorDescriptor.from_tensor(weight, box) if tma else weight,
            index, offsets,
            TensorDescriptor.from_tensor(out, [tile.rows, tile.columns // 2]) if tma_out else None,
            out, rows, experts, n, k, chunk, x.stride(0), **constants,
        )  # fmt: skip
    return out


def grouped_weight_gradient(
    x: Tensor, grad: Tensor, offsets: Tensor, index: Tensor | None = None, *, tile: Tile | None = None
) -> Tensor:
    """gradᵀ x over the rows of each expert, added in their order; zeros for an expert without rows.

    x: [R, K], or any [T, K] with an index [R]; grad: [R, N] in x's dtype; offsets: [E + 1] int32 -> [E, N, K].

    Raises:
        BackendError: a dtype, shape or device that the kernel does not take.
    """
    check_gradient(x, grad, offsets, index)
    rows = grad.shape[0]
    experts, n, k = offsets.shape[0] - 1, grad.shape[1], x.shape[1]
    if not rows or not n or not k:
        return torch.zeros((experts, n, k), dtype=x.dtype, device=x.device)
    out = torch.empty((experts, n, k), dtype=x.dtype, device=x.device)
    x = x if x.stride(1) == 1 else x.contiguous()
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    tile = tile or (FP32 if x.dtype == torch.float32 else GRADIENT)
    tma = has_tma(x.device) and x.dtype != torch.float32 and aligned(x) and aligned(grad)
    tiles = experts * triton.cdiv(n, tile.rows) * triton.cdiv(k, tile.columns)
    with on_device(x):
        grouped_weight_kernel[(tiles,)](
            x, grad, index, offsets,
            TensorDescriptor.from_tensor(x, [tile.k, tile.columns]) if tma and index is None else None,
            TensorDescriptor.from_tensor(grad, [tile.k, tile.rows]) if tma else None,
            out, rows, n, k, x.stride(0), grad.stride(0),
            ROWS=tile.rows, COLUMNS=tile.columns, STEP=tile.k, GROUP=8, GATHER=index is not None, TMA=tma,
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out
