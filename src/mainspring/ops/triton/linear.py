"""y = x Wᵀ + b in canonical order.

K is summed in chunks that `k_chunk` gives as a function of (N, K), the chunks added in order. Within a
chunk every output element is one chain of matrix instructions of 16 k each (8 in fp32: of single fused
multiply-adds), whatever the tile; so tiles may follow M, and a row's bits are the same for every M.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mainspring.ops.triton.support import aligned, check_dtype, has_tma, multiprocessors, on_device, require

CHUNK_STEP = 128  # a chunk of K is a multiple of this


@dataclass(frozen=True)
class Tile:
    """Shape of a block's work. rows: of x, columns: of y (rows of W), k: depth of a step."""

    rows: int
    columns: int
    k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class _Choice:
    tile: Tile
    efficiency: (
        float  # relative throughput of a multiprocessor that is busy with such tiles, measured on an H200
    )


_CHOICES = (
    _Choice(Tile(128, 256, 64, 8, 4), 1.0),
    _Choice(Tile(128, 128, 64, 8, 4), 0.9),
    _Choice(Tile(64, 256, 64, 8, 4), 0.8),
    _Choice(Tile(64, 128, 64, 4, 5), 0.7),
    _Choice(Tile(64, 64, 64, 4, 6), 0.55),
)
_FP32_TILE = Tile(64, 64, 16, 4, 2)
SHARED_BYTES = 226 << 10  # of a block on Hopper, less what barriers take


def stages_beside_output(tile: Tile, in_bytes: int, out_bytes: int, halves: bool) -> int:
    """The tile's stages, or as many as leave shared memory for its output (of float32: 128 KB for the largest)."""
    output = tile.rows * tile.columns * out_bytes // (2 if halves else 1)
    return max(
        1, min(tile.stages, (SHARED_BYTES - output) // ((tile.rows + tile.columns) * tile.k * in_bytes))
    )


def k_chunk(n: int, k: int) -> int:
    """How many of K are summed in one chain: all, unless so few columns leave a GPU without work."""
    chunks = max(1, min(1024 // n, k // 1024))
    step = chunks * CHUNK_STEP
    return (k + step - 1) // step * CHUNK_STEP


@lru_cache(maxsize=4096)
def choose_tile(m: int, n: int, k: int, dtype: torch.dtype, processors: int) -> Tile:
    """The tile with the least time by a simple model: waves of blocks times the area of a tile."""
    if dtype == torch.float32:
        return _FP32_TILE

    def cost(choice: _Choice) -> float:
        tile = choice.tile
        blocks = -(-m // tile.rows) * -(-n // tile.columns)
        waves = -(-blocks // processors)
        return waves * tile.rows * tile.columns / choice.efficiency

    return min(_CHOICES, key=cost).tile


@triton.jit
def _chain(
    x, w, row, column, first, last, m, n, depth, x_stride, w_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The products of one tile over k = first .. last, in order, in fp32."""
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    rows = (row + tl.arange(0, ROWS)).to(tl.int64)
    columns = (column + tl.arange(0, COLUMNS)).to(tl.int64)
    for k in range(first, last, STEP):
        if TMA:
            a = x.load([row, k])
            b = w.load([column, k])
        else:
            ks = k + tl.arange(0, STEP)
            inside = ks[None, :] < depth
            a = tl.load(x + rows[:, None] * x_stride + ks[None, :], (rows[:, None] < m) & inside, 0.0)
            b = tl.load(w + columns[:, None] * w_stride + ks[None, :], (columns[:, None] < n) & inside, 0.0)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _store(
    out, bias, acc, row, column, m, n, TMA_OUT: tl.constexpr,
    BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    if TMA_OUT:
        # In two halves: what a tile's output takes of shared memory is a stage of the inputs less.
        halves = tl.permute(tl.reshape(acc, (ROWS, 2, COLUMNS // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        _store_half(out, bias, left, row, column, n, BIAS, COLUMNS // 2)
        _store_half(out, bias, right, row, column + COLUMNS // 2, n, BIAS, COLUMNS // 2)
    else:
        columns = column + tl.arange(0, COLUMNS)
        if BIAS:
            acc += tl.load(bias + columns, columns < n, 0.0).to(tl.float32)[None, :]
        rows = (row + tl.arange(0, ROWS)).to(tl.int64)
        inside = (rows[:, None] < m) & (columns[None, :] < n)
        tl.store(out + rows[:, None] * n + columns[None, :], acc.to(out.dtype.element_ty), inside)


@triton.jit
def _store_half(out, bias, acc, row, column, n, BIAS: tl.constexpr, COLUMNS: tl.constexpr):
    if BIAS:
        columns = column + tl.arange(0, COLUMNS)
        acc += tl.load(bias + columns, columns < n, 0.0).to(tl.float32)[None, :]
    out.store([row, column], acc.to(out.dtype))


@triton.jit
def _tile_origin(tile, m, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """(first row, first column) of a tile; GROUP tiles of rows share the columns that are in the L2 cache."""
    row_tiles, column_tiles = tl.cdiv(m, ROWS), tl.cdiv(n, COLUMNS)
    band = tile // (GROUP * column_tiles)
    band_rows = min(row_tiles - band * GROUP, GROUP)
    inside = tile % (GROUP * column_tiles)
    return (band * GROUP + inside % band_rows) * ROWS, inside // band_rows * COLUMNS


@triton.jit(do_not_specialize=["m"])
def linear_kernel(
    x, w, bias, out, m, n, depth, chunk, x_stride, w_stride, CHUNKED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
    GROUP: tl.constexpr, TMA: tl.constexpr, TMA_OUT: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Persistent: each block walks over tiles and adds the chunks of K itself."""
    tiles = tl.cdiv(m, ROWS) * tl.cdiv(n, COLUMNS)
    if not CHUNKED:
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            row, column = _tile_origin(tile, m, n, ROWS, COLUMNS, GROUP)
            acc = _chain(
                x,
                w,
                row,
                column,
                0,
                depth,
                m,
                n,
                depth,
                x_stride,
                w_stride,
                ROWS,
                COLUMNS,
                STEP,
                TMA,
                PRECISION,
            )
            _store(out, bias, acc, row, column, m, n, TMA_OUT, BIAS, ROWS, COLUMNS)
    else:
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
            row, column = _tile_origin(tile, m, n, ROWS, COLUMNS, GROUP)
            total = tl.zeros((ROWS, COLUMNS), tl.float32)
            for first in range(0, depth, chunk):
                last = min(first + chunk, depth)
                total += _chain(
                    x, w, row, column, first, last, m, n, depth, x_stride, w_stride, ROWS, COLUMNS, STEP, TMA, PRECISION
                )  # fmt: skip
            _store(out, bias, total, row, column, m, n, TMA_OUT, BIAS, ROWS, COLUMNS)


@triton.jit(do_not_specialize=["m"])
def chunk_kernel(
    x, w, partial, m, n, depth, chunk_size, x_stride, w_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
    GROUP: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block per tile and chunk of K; partial: [chunks, m, n] fp32."""
    chunk = tl.program_id(1)
    row, column = _tile_origin(tl.program_id(0), m, n, ROWS, COLUMNS, GROUP)
    first = chunk * chunk_size
    acc = _chain(
        x, w, row, column, first, min(first + chunk_size, depth), m, n, depth, x_stride, w_stride,
        ROWS, COLUMNS, STEP, TMA, PRECISION,
    )  # fmt: skip
    rows = (row + tl.arange(0, ROWS)).to(tl.int64)
    columns = column + tl.arange(0, COLUMNS)
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    tl.store(partial + (chunk * m + rows[:, None]) * n + columns[None, :], acc, inside)


@triton.jit(do_not_specialize=["size"])
def combine_kernel(
    partial, bias, out, size, n, CHUNKS: tl.constexpr, BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the chunks in order. partial: [CHUNKS, size] fp32, size = m · n."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    total = tl.zeros((BLOCK,), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        total += tl.load(partial + chunk * size + index, inside, 0.0)
    if BIAS:
        total += tl.load(bias + index % n, inside, 0.0).to(tl.float32)
    tl.store(out + index, total.to(out.dtype.element_ty), inside)


def check(
    operation: str, x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None
) -> torch.dtype:
    """The dtype of the result. Raises BackendError for arguments that do not fit each other or the kernels."""
    check_dtype(operation, x)
    if x.dim() != 2 or weight.dim() != 2:
        shapes = tuple(x.shape), tuple(weight.shape)
        require(operation, False, f"x and weight must be [M, K] and [N, K], not {shapes[0]} and {shapes[1]}")
    (n, weight_k), k = weight.shape, x.shape[1]
    require(
        operation,
        weight.dtype is x.dtype and weight_k == k and k > 0 and weight.device == x.device,
        f"weight {weight.dtype} {tuple(weight.shape)} on {weight.device} does not fit x {x.dtype} {tuple(x.shape)}",
    )
    if bias is not None and (bias.shape != (n,) or bias.dtype is not x.dtype or bias.device != x.device):
        found = f"{tuple(bias.shape)} of {bias.dtype} on {bias.device}"
        require(operation, False, f"bias must be [{n}] of {x.dtype} on {x.device}, not {found}")
    out_dtype = x.dtype if out_dtype is None else out_dtype
    require(operation, out_dtype in (x.dtype, torch.float32), f"out_dtype must be {x.dtype} or float32")
    return out_dtype


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """`x @ weight.T + bias`, summed in fp32 and rounded once; a row's bits do not depend on the other rows.

    Args:
        x: [M, K] float32 (computed without TF32), bfloat16 or float16.
        weight: [N, K] in x's dtype.
        bias: [N] in x's dtype, or None.
        out_dtype: x's dtype (None) or float32.
        tile: another tile than the table's (tests and benchmarks); it changes no bit.

    Returns:
        [M, N], contiguous.

    Raises:
        BackendError: a dtype or shape that the kernel does not take.
    """
    out_dtype = check("linear", x, weight, bias, out_dtype)
    (m, k), n = x.shape, weight.shape[0]
    out = torch.empty((m, n), dtype=out_dtype, device=x.device)
    if m and n:
        x = x if x.stride(1) == 1 else x.contiguous()
        weight = weight if weight.stride(1) == 1 else weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        tile = tile or choose_tile(m, n, k, x.dtype, multiprocessors(x.device))
        with on_device(x):
            _launch(x, weight, bias, out, tile)
    return out


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, tile: Tile) -> None:
    (m, k), n = x.shape, weight.shape[0]
    chunk = k_chunk(n, k)
    chunks = -(-k // chunk)
    processors = multiprocessors(x.device)
    tiles = triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns)
    tma = has_tma(x.device) and x.dtype != torch.float32 and aligned(weight)
    if tma and not aligned(x):
        x = x.clone(memory_format=torch.contiguous_format)  # rows of the weight are aligned, so these are
    source = TensorDescriptor.from_tensor(x, [tile.rows, tile.k]) if tma else x
    weights = TensorDescriptor.from_tensor(weight, [tile.columns, tile.k]) if tma else weight
    precision = "ieee" if x.dtype == torch.float32 else "tf32"  # the latter is what 16-bit products ignore
    shared: dict[str, Any] = {
        "ROWS": tile.rows, "COLUMNS": tile.columns, "STEP": tile.k, "GROUP": 8,
        "TMA": tma, "PRECISION": precision, "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    if chunks > 1 and tiles * 2 <= processors:
        partial = torch.empty((chunks, m, n), dtype=torch.float32, device=x.device)
        chunk_kernel[(tiles, chunks)](
            source, weights, partial, m, n, k, chunk, x.stride(0), weight.stride(0), **shared
        )
        block = 256
        combine_kernel[(triton.cdiv(m * n, block),)](
            partial, bias, out, m * n, n, CHUNKS=chunks, BIAS=bias is not None, BLOCK=block
        )
        return
    # A float32 tile of 64 rows would be laid out anew for the copy, for which there is no shared memory.
    tma_out = tma and aligned(out) and (out.element_size() == 2 or tile.rows >= 128)
    shared["num_stages"] = stages_beside_output(tile, x.element_size(), out.element_size(), tma_out)
    target = TensorDescriptor.from_tensor(out, [tile.rows, tile.columns // 2]) if tma_out else out
    blocks_each = max(1, 512 // (tile.warps * 32) // 2)
    linear_kernel[(min(tiles, processors * blocks_each),)](
        source, weights, bias, target, m, n, k, chunk, x.stride(0), weight.stride(0),
        CHUNKED=chunks > 1,
        TMA_OUT=tma_out, BIAS=bias is not None, **shared,
    )  # fmt: skip
