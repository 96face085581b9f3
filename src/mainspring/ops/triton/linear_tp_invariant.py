"""y = x Wᵀ whose K is cut into equal segments that a binary tree joins, so that ranks which own subtrees agree.

Each segment is one chain of matrix instructions, as in `linear`. Where rows are few the segments are blocks of their
own; where they are many a block adds them as it goes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mainspring.ops.triton.linear import Tile, _chain, _tile_origin, check, chunk_kernel, k_chunk, linear
from mainspring.ops.triton.support import (
    aligned,
    has_tma,
    multiprocessors,
    on_device,
    require,
)

MAX_SEGMENTS = 8
_LARGE = Tile(128, 64, 64, 8, 4)
_SMALL = Tile(64, 64, 64, 4, 6)
_FP32 = Tile(64, 64, 16, 8, 2)


@triton.jit(do_not_specialize=["m"])
def tree_kernel(
    x, w, bias, out, m, n, segment, x_stride, w_stride,
    FOURS: tl.constexpr, PAIRS: tl.constexpr, HALVES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    STEP: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block per tile. FOURS · PAIRS · HALVES segments; starting a sum from zero changes no bit of it."""
    row, column = _tile_origin(tl.program_id(0), m, n, ROWS, COLUMNS, GROUP)
    whole = tl.zeros((ROWS, COLUMNS), tl.float32)
    for four in range(FOURS):
        quarter = tl.zeros((ROWS, COLUMNS), tl.float32)
        for pair in range(PAIRS):
            both = tl.zeros((ROWS, COLUMNS), tl.float32)
            for half in range(HALVES):
                first = ((four * PAIRS + pair) * HALVES + half) * segment
                last = first + segment
                both += _chain(
                    x, w, row, column, first, last, m, n, last, x_stride, w_stride, ROWS, COLUMNS, STEP, TMA, PRECISION
                )  # fmt: skip
            quarter += both
        whole += quarter
    columns = column + tl.arange(0, COLUMNS)
    if BIAS:
        whole += tl.load(bias + columns, columns < n, 0.0).to(tl.float32)[None, :]
    rows = (row + tl.arange(0, ROWS)).to(tl.int64)
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    tl.store(out + rows[:, None] * n + columns[None, :], whole.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["size"])
def join_kernel(
    partial, bias, out, size, n, COUNT: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The tree over partial [COUNT, size], fp32; absent leaves are zeros, which change no bit."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    whole = tl.zeros((BLOCK,), tl.float32)
    for four in tl.static_range(0, COUNT, 4):
        quarter = tl.zeros((BLOCK,), tl.float32)
        for pair in tl.static_range(0, 4, 2):
            if four + pair < COUNT:
                both = tl.load(partial + (four + pair) * size + index, inside, 0.0)
                if four + pair + 1 < COUNT:
                    both += tl.load(partial + (four + pair + 1) * size + index, inside, 0.0)
                quarter += both
        whole += quarter
    if BIAS:
        whole += tl.load(bias + index % n, inside, 0.0).to(tl.float32)
    tl.store(out + index, whole.to(out.dtype.element_ty), inside)


def splits(m: int, n: int, processors: int) -> bool:
    """Whether there are so few tiles that segments become blocks of their own."""
    tiles = -(-m // _SMALL.rows) * -(-n // _SMALL.columns)
    return tiles * 2 <= processors


def segmented_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype, segments: int
) -> Tensor:
    """`x @ weight.T + bias` over `segments` equal segments of K, joined by a binary tree in fp32 and rounded once.

    Args:
        x: [M, K] float32, bfloat16 or float16.
        weight: [N, K] in x's dtype.
        bias: [N] in x's dtype, or None.
        out_dtype: x's dtype or float32.
        segments: 1, 2, 4 or 8, a divisor of K.

    Returns:
        [M, N], contiguous; a row's bits do not depend on the others.

    Raises:
        BackendError: a dtype, shape or number of segments that the kernel does not take.
    """
    name = "linear_tp_invariant"
    out_dtype = check(name, x, weight, bias, out_dtype)
    (m, k), n = x.shape, weight.shape[0]
    require(name, segments in (1, 2, 4, MAX_SEGMENTS), f"segments must be 1, 2, 4 or 8, not {segments}")
    require(name, k > 0 and k % segments == 0, f"K = {k} cannot be cut into {segments} equal segments")
    if segments == 1 and k_chunk(n, k) >= k:
        return linear(x, weight, bias, out_dtype)  # the same chain
    out = torch.empty((m, n), dtype=out_dtype, device=x.device)
    if m and n:
        x = x if x.stride(1) == 1 else x.contiguous()
        weight = weight if weight.stride(1) == 1 else weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        with on_device(x):
            _launch(x, weight, bias, out, segments)
    return out


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, segments: int) -> None:
    (m, k), n = x.shape, weight.shape[0]
    segment, processors = k // segments, multiprocessors(x.device)
    wide = x.dtype == torch.float32
    small = _FP32 if wide else _SMALL
    tiles = triton.cdiv(m, small.rows) * triton.cdiv(n, small.columns)
    step = next((s for s in (64, 32, 16) if segment % s == 0 and s <= small.k), 0)
    split = segments > 1 and step > 0 and splits(m, n, processors)
    tile = small if split or wide else _LARGE
    tma = has_tma(x.device) and not wide and aligned(weight) and step > 0
    if tma and not aligned(x):
        x = x.clone(memory_format=torch.contiguous_format)
    step = step or tile.k  # without a divisor the last step of a segment is masked
    shared: dict[str, Any] = {
        "ROWS": tile.rows, "COLUMNS": tile.columns, "STEP": step, "GROUP": 8, "TMA": tma,
        "PRECISION": "ieee" if wide else "tf32", "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    source = TensorDescriptor.from_tensor(x, [tile.rows, step]) if tma else x
    weights = TensorDescriptor.from_tensor(weight, [tile.columns, step]) if tma else weight
    if not split:
        tiles = triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns)
        tree_kernel[(tiles,)](
            source, weights, bias, out, m, n, segment, x.stride(0), weight.stride(0), FOURS=max(1, segments // 4),
            PAIRS=2 if segments >= 4 else 1, HALVES=2 if segments >= 2 else 1, BIAS=bias is not None, **shared,
        )  # fmt: skip
        return
    partial = torch.empty((segments, m, n), dtype=torch.float32, device=x.device)
    chunk_kernel[(tiles, segments)](
        source, weights, partial, m, n, k, segment, x.stride(0), weight.stride(0), **shared
    )
    join_kernel[(triton.cdiv(m * n, 256),)](
        partial, bias, out, m * n, n, COUNT=segments, BIAS=bias is not None, BLOCK=256
    )
