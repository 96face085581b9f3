"""Matrix product with weights as GGML quantises them (csrc/kernels/quantised.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from mainspring.ops.checks import reject
from mainspring.ops.cpu.extension import DTYPE_CODES, dtype_code, require_kernels

# The codes of kernels.h (ms_quantised_type), and the bytes of a block of 32 in a file.
TYPE_CODES: dict[str, int] = {"Q4_0": 0, "Q4_1": 1, "Q8_0": 2}
BLOCK_BYTES: dict[str, int] = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
BLOCK = 32  # weights
GROUP = 16  # rows that lie together in the packed layout


def pack(kind: str, rows: Tensor) -> Tensor:
    """Rows of blocks, uint8 [N, K / 32 * BLOCK_BYTES], in the kernel's layout: the same bits, other places.

    Raises:
        BackendError: rows that are no whole blocks, or no C++ kernels here.
    """
    n, width = rows.shape
    if rows.dtype is not torch.uint8 or width % BLOCK_BYTES[kind] or rows.stride(1) != 1:
        raise reject(
            "quantised_linear", f"rows of {kind} are uint8 and whole blocks of {BLOCK_BYTES[kind]} bytes"
        )
    k = width // BLOCK_BYTES[kind] * BLOCK
    module, code = require_kernels(), TYPE_CODES[kind]
    packed = torch.empty(module.quantised_bytes(code, n, k), dtype=torch.uint8)
    module.quantised_pack(rows.data_ptr(), rows.stride(0), packed.data_ptr(), n, k, code)
    return packed


def quantised_linear(
    x: Tensor, kind: str, packed: Tensor, bias: Tensor | None, out: Tensor, num_rows: int
) -> None:
    """out = x Wᵀ + bias, with x rounded to int8 in blocks of 32; a row's bits do not depend on the other rows.

    Args:
        x: [M, K] float32 or bfloat16, last dimension contiguous, K a multiple of 32.
        packed: what `pack` made of `num_rows` rows of `kind`.
        bias: [N] contiguous in x's dtype, or None.
        out: [M, N] in x's dtype or float32, last dimension contiguous; written to.

    Raises:
        BackendError: a device, dtype, shape or layout that the kernel does not take.
    """
    m, k = x.shape
    code = dtype_code("quantised_linear", x)
    module = require_kernels()
    if packed.numel() != module.quantised_bytes(TYPE_CODES[kind], num_rows, k) or k % BLOCK:
        raise reject(
            "quantised_linear",
            f"x [{m}, {k}] does not fit {num_rows} rows of {kind} in {packed.numel()} bytes",
        )
    if x.stride(1) != 1 or out.stride(1) != 1 or out.shape != (m, num_rows):
        raise reject("quantised_linear", f"x and out must be contiguous along rows, out be [{m}, {num_rows}]")
    if out.dtype is not x.dtype and out.dtype is not torch.float32:
        raise reject("quantised_linear", f"out must be {x.dtype} or torch.float32, not {out.dtype}")
    if bias is not None and (
        bias.dtype is not x.dtype or bias.shape != (num_rows,) or not bias.is_contiguous()
    ):
        raise reject("quantised_linear", f"bias must be a contiguous [{num_rows}] of {x.dtype}")
    module.quantised_linear(
        x.data_ptr(), x.stride(0), packed.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr(),
        out.stride(0), m, num_rows, k, TYPE_CODES[kind], code, DTYPE_CODES[out.dtype],
    )  # fmt: skip
