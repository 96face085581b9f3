"""One linear layer per expert for Hopper (csrc/cuda/grouped_linear.cu), with the bits of Triton's grouped linear.

Gathered rows, float32, few rows an expert and what the copy engine cannot read are left to the Triton kernels; for a
weight's gradient rows are gathered first, which takes a tenth of what is won.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mainspring.ops.cuda import compiler
from mainspring.ops.cuda.linear import TYPES
from mainspring.ops.triton.support import aligned, multiprocessors, on_device

SOURCE = "grouped_linear.cu"
FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = range(3)
# Columns of a tile (of 256 rows, in the gradients of 128), of which a pair of blocks has two side by side, and the time
# of a column in such a tile. A transposed operand comes in panels of 64.
COLUMNS = {
    FORWARD: {192: 1.007, 176: 1.0, 128: 1.05},
    INPUT_GRADIENT: {256: 1.0, 192: 1.03, 128: 1.12},
    WEIGHT_GRADIENT: {256: 1.0, 192: 1.03, 128: 1.12},
}
MIN_ROWS = 64  # of an average expert


def defines_of(dtype: torch.dtype, kind: int, columns: int) -> compiler.Defines:
    return (
        ("MAINSPRING_TYPE", TYPES[dtype]), ("MAINSPRING_KIND", kind), ("MAINSPRING_COLUMNS", columns),
    )  # fmt: skip


@lru_cache(maxsize=64)
def _launcher(dtype: torch.dtype, kind: int, columns: int) -> tuple[ctypes.CDLL, Any]:
    library = compiler.load(SOURCE, defines_of(dtype, kind, columns))
    function = library.mainspring_grouped
    pointer, wide, word = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    function.argtypes = [pointer, wide, pointer, wide, pointer, pointer, pointer, *[word] * 6, pointer]
    function.restype = word
    return library, function


@lru_cache(maxsize=1024)
def choose_columns(kind: int, n: int) -> int:
    """The width of tiles, two side by side, that cover n columns in the least time."""
    return min(COLUMNS[kind], key=lambda c: -(-n // (2 * c)) * c * COLUMNS[kind][c])


def launch(kind: int, a: Tensor, b: Tensor, offsets: Tensor, out: Tensor, columns: int) -> None:
    """One launch on the current device; operands as csrc/cuda/grouped_linear.cu has them."""
    library, function = _launcher(a.dtype, kind, columns)
    experts = offsets.shape[0] - 1
    rows, n = (a.shape[1], out.shape[2]) if kind == WEIGHT_GRADIENT else (0, out.shape[1])
    counter = torch.empty(1, dtype=torch.int32, device=a.device)
    code = function(
        a.data_ptr(), a.stride(0), b.data_ptr(), b.stride(0), offsets.data_ptr(), counter.data_ptr(),
        out.data_ptr(), a.shape[0], experts, rows, n, a.shape[1], multiprocessors(a.device),
        torch.cuda.current_stream().cuda_stream,
    )  # fmt: skip
    compiler.check(library, "grouped_linear", code)


def _serves(a: Tensor, b: Tensor, offsets: Tensor) -> bool:
    enough = a.shape[0] >= MIN_ROWS * (offsets.shape[0] - 1)
    return enough and a.dtype in TYPES and aligned(a) and aligned(b)


def grouped_linear(
    x: Tensor, weight: Tensor, offsets: Tensor, index: Tensor | None = None, *, transposed: bool = False
) -> Tensor:
    """Arguments, result, errors and bits of `mainspring.ops.triton.grouped_linear.grouped_linear`."""
    from mainspring.ops.triton import grouped_linear as kernels
    from mainspring.ops.triton.linear import k_chunk

    n = kernels.check(x, weight, offsets, index, transposed)
    k, rows = x.shape[1], x.shape[0]
    served = index is None and rows > 0 and n > 0 and n % 8 == 0 and weight.is_contiguous()
    served = served and _serves(x, weight, offsets) and (transposed or k_chunk(n, k) >= k)
    if not served:
        return kernels.grouped_linear(x, weight, offsets, index, transposed=transposed)
    kind = INPUT_GRADIENT if transposed else FORWARD
    out = torch.empty((rows, n), dtype=x.dtype, device=x.device)
    with on_device(x):
        launch(kind, x, weight, offsets, out, choose_columns(kind, n))
    return out


def grouped_weight_gradient(x: Tensor, grad: Tensor, offsets: Tensor, index: Tensor | None = None) -> Tensor:
    """Arguments, result and errors of `mainspring.ops.triton.grouped_linear.grouped_weight_gradient`."""
    from mainspring.ops.triton import grouped_linear as kernels

    kernels.check_gradient(x, grad, offsets, index)
    experts, n, k = offsets.shape[0] - 1, grad.shape[1], x.shape[1]
    if n * k * grad.shape[0] == 0 or not _serves(grad, x, offsets):
        return kernels.grouped_weight_gradient(x, grad, offsets, index)
    if index is not None:
        # Triton's kernel reaches 401 TFLOP/s where it gathers rows of the reduced axis, this one 681 (H100).
        x = x.index_select(0, index)
    out = torch.empty((experts, n, k), dtype=x.dtype, device=x.device)
    with on_device(x):
        launch(WEIGHT_GRADIENT, grad, x, offsets, out, choose_columns(WEIGHT_GRADIENT, k))
    return out
