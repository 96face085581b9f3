"""y = x Wᵀ + b for Hopper (csrc/cuda/linear.cu), with the bits of `triton.linear`: the same chains of products.

Its tiles fill the chip in one wave where rows are few; products of many rows are left to the Triton kernel, whose
blocks walk over several tiles each. It also serves `linear_tp_invariant` where rows are many: a block sums the
segments of K and joins them by the tree.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mainspring.ops.cuda import compiler
from mainspring.ops.triton.support import aligned, multiprocessors, on_device

SOURCE = "linear.cu"
GROUP_ROWS = 64  # rows of a warpgroup's product
MAX_CHUNKS = 8  # blocks of a portable cluster
TYPES = {torch.bfloat16: "__nv_bfloat16", torch.float16: "__half"}


@dataclass(frozen=True)
class Tile:
    """A block's work. groups: of 64 rows; columns: of y; panels: of 64 k in a step.

    stages: steps in flight at most; blocks: of a multiprocessor; prefetch: steps of W that are brought into the cache
    before the kernels ahead have ended, or None to start when they have; late: when the kernel behind may start.
    """

    groups: int
    columns: int
    panels: int
    stages: int = 8
    blocks: int = 1
    prefetch: int | None = 0
    late: bool = True


TILES = (
    Tile(2, 32, 2), Tile(2, 48, 2), Tile(2, 64, 2), Tile(2, 96, 1), Tile(2, 128, 1), Tile(2, 192, 1), Tile(2, 224, 1),
    Tile(2, 256, 1), Tile(3, 224, 1), Tile(1, 16, 4), Tile(1, 24, 4), Tile(1, 32, 4), Tile(1, 48, 2), Tile(1, 64, 2),
    Tile(1, 96, 1), Tile(1, 128, 1), Tile(1, 192, 1), Tile(1, 224, 1), Tile(1, 256, 1),
)  # fmt: skip
# Above so many rows decoding is 1 % faster if the kernel behind may start at once (Llama-3.1-8B's shape, an H100).
EARLY_ROWS = 192
# Of the kernel whose blocks join the segments of K themselves: four sums of this size fit its registers.
SEGMENTED = Tile(2, 96, 1)
# Rows up to which a gated product is faster than a plain one and the gate behind it. The gate is a tile's last work,
# which nothing hides: gate, up and down of Llama-3.1-8B take 4 % less time at 128 rows, 3 % more at 192 and 256 (H100).
GATED_ROWS = 2 * GROUP_ROWS
# One row takes 0.7 % more where so many weights come from memory every time.
_ONE_ROW_BYTES = 50 << 20
# Of those that take half their columns from the gate and half from the up projection.
GATED_TILES = tuple(tile for tile in TILES if tile.columns % 16 == 0 and tile.groups < 3)


def _cost(tile: Tile, m: int, n: int, chunk: int, chunks: int, processors: int) -> float:
    """The time of a step of k in a simple model, in rows of operands (1.3 ns on an H100).

    A tile takes the longer of what its operands take to arrive (a multiprocessor takes in so many bytes a cycle) and
    what its products take, times the waves of blocks. Of some 1,300 products that were timed in all tiles (M 8 to 640,
    the layers of Qwen3-0.6B and Llama-3.1-8B) its choice is 0.3 % behind the fastest on average.
    """
    rows = GROUP_ROWS * tile.groups
    blocks = -(-m // rows) * -(-n // tile.columns) * chunks
    arriving: float = (min(rows, -(-m // 8) * 8) if tile.groups == 1 else rows) + tile.columns
    if tile.groups == 1 and tile.columns > 64:
        arriving += 800 * GROUP_ROWS / chunk - 10  # nothing runs while a lone warpgroup stores its tile
    return -(-blocks // processors) * (16 + max(arriving, rows * tile.columns / 60))


def _best(m: int, n: int, chunk: int, chunks: int, processors: int, gated: bool) -> Tile | None:
    def fits(tile: Tile) -> bool:
        if gated and tile not in GATED_TILES:
            return False
        if chunks > 1 and (chunk % (GROUP_ROWS * tile.panels) or tile.groups > 2):
            return False
        # Of tiles of one warpgroup only single waves were timed where rows are many.
        blocks = -(-m // GROUP_ROWS) * -(-n // tile.columns) * chunks
        return tile.groups > 1 or m <= 2 * GROUP_ROWS or blocks <= processors

    fitting = filter(fits, TILES)
    return min(fitting, key=lambda t: _cost(t, m, n, chunk, chunks, processors), default=None)


@lru_cache(maxsize=4096)
def choose_tile(m: int, n: int, k: int, chunk: int, processors: int, gated: bool = False) -> Tile | None:
    """The tile with the least time, or None where Triton's kernel is faster. gated: n counts gate's and up's rows."""
    chunks = -(-k // chunk)
    tile = _best(m, n, chunk, chunks, processors, gated) if chunks <= MAX_CHUNKS else None
    if tile is None:
        return None
    blocks = -(-m // (GROUP_ROWS * tile.groups)) * -(-n // tile.columns) * chunks
    few = blocks <= processors or (m <= 1024 and blocks <= 2 * processors)
    tile = replace(tile, late=m <= EARLY_ROWS)
    if chunks > 1:  # a cluster needs its multiprocessors side by side: halves of them are easier to find
        return replace(tile, blocks=2) if few else None
    return tile if m <= 4 * GROUP_ROWS or few else None


def defines_of(
    dtype: torch.dtype, tile: Tile, segmented: bool = False, gated: bool = False
) -> compiler.Defines:
    shape = (
        ("MAINSPRING_TYPE", TYPES[dtype]), ("MAINSPRING_GROUPS", tile.groups), ("MAINSPRING_COLUMNS", tile.columns),
        ("MAINSPRING_PANELS", tile.panels),
    )  # fmt: skip
    kinds = (("MAINSPRING_SEGMENTED", segmented), ("MAINSPRING_GATED", gated))
    return (*shape, *((name, 1) for name, given in kinds if given))


@lru_cache(maxsize=4)
def build_ahead(dtype: torch.dtype, gated: bool = False) -> None:
    """Starts compiling a table's tiles side by side, so that no later call waits long for one of them."""
    tiles = {defines_of(dtype, tile, gated=gated) for tile in (GATED_TILES if gated else TILES)}
    compiler.build_ahead((SOURCE, defines) for defines in sorted(tiles, key=repr))


@lru_cache(maxsize=256)
def _launcher(
    dtype: torch.dtype, groups: int, columns: int, panels: int, segmented: bool, gated: bool
) -> tuple[ctypes.CDLL, Any]:
    if not segmented:
        build_ahead(dtype, gated)
    defines = defines_of(dtype, Tile(groups, columns, panels), segmented, gated)
    library = compiler.load(SOURCE, defines)
    function = library.mainspring_linear
    pointer, wide, word = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    function.argtypes = [pointer, wide, pointer, wide, pointer, pointer, *[word] * 10, pointer]
    function.restype = word
    return library, function


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    chunk: int,
    tile: Tile,
    tree: bool = False,
    gated: bool = False,
) -> None:
    """One launch. x: [M, K], weight: [N, K], rows 16-byte aligned; out: [M, N], contiguous; on the current device.

    gated: weight: [2 N, K], and bias: [2 N], the gate's rows first.
    """
    (m, k), n = x.shape, out.shape[1]
    segmented = tree and tile == SEGMENTED
    library, function = _launcher(x.dtype, tile.groups, tile.columns, tile.panels, segmented, gated)
    code = function(
        x.data_ptr(), x.stride(0), weight.data_ptr(), weight.stride(0), None if bias is None else bias.data_ptr(),
        out.data_ptr(), m, n, k, chunk, tree, out.dtype == torch.float32, tile.stages, tile.blocks,
        0 if tile.prefetch is None else 1 + tile.prefetch, tile.late, torch.cuda.current_stream().cuda_stream,
    )  # fmt: skip
    compiler.check(library, "linear", code)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """`x @ weight.T + bias`: arguments, result, errors and bits of `mainspring.ops.triton.linear.linear`."""
    from mainspring.ops.triton.linear import check, k_chunk
    from mainspring.ops.triton.linear import linear as triton_linear

    out_dtype = check("linear", x, weight, bias, out_dtype)
    (m, k), n = x.shape, weight.shape[0]
    served = m > 0 and n > 0 and x.dtype in TYPES and aligned(x) and aligned(weight)
    chunk = k_chunk(n, k)
    tile = choose_tile(m, n, k, chunk, multiprocessors(x.device)) if served else None
    if tile is None:
        return triton_linear(x, weight, bias, out_dtype)
    out = torch.empty((m, n), dtype=out_dtype, device=x.device)
    with on_device(x):
        launch(x, weight, None if bias is None else bias.contiguous(), out, chunk, tile)
    return out


def linear_swiglu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """`swiglu(linear(x, weight, bias))` in one launch, with the bits of both; None where two are faster.

    x: [M, K], weight: [2 I, K] and bias: [2 I] of bfloat16 or float16, the gate's rows first. -> [M, I]

    Raises BackendError as `linear` does.
    """
    from mainspring.ops.triton.linear import check, k_chunk

    check("linear_swiglu", x, weight, bias, None)
    (m, k), n = x.shape, weight.shape[0]
    chunk = k_chunk(n, k)
    slower = m > GATED_ROWS or (m == 1 and weight.numel() * weight.element_size() > _ONE_ROW_BYTES)
    if slower or m == 0 or n % 2 or chunk < k or not (aligned(x) and aligned(weight)):
        return None
    tile = choose_tile(m, n, k, chunk, multiprocessors(x.device), gated=True)
    if tile is None:
        return None
    out = torch.empty((m, n // 2), dtype=x.dtype, device=x.device)
    with on_device(x):
        launch(x, weight, None if bias is None else bias.contiguous(), out, chunk, tile, gated=True)
    return out


def segmented_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype, segments: int
) -> Tensor:
    """As `mainspring.ops.triton.linear_tp_invariant.segmented_linear`."""
    from mainspring.ops.triton.linear import check, k_chunk
    from mainspring.ops.triton.linear_tp_invariant import segmented_linear as triton_segmented_linear
    from mainspring.ops.triton.linear_tp_invariant import splits

    out_dtype = check("linear_tp_invariant", x, weight, bias, out_dtype)
    (m, k), n = x.shape, weight.shape[0]
    if segments == 1 and k_chunk(n, k) >= k:
        return linear(x, weight, bias, out_dtype)
    served = m > 0 and n > 0 and segments in (2, 4, 8) and k % (segments * GROUP_ROWS) == 0
    served = served and x.dtype in TYPES and aligned(x) and aligned(weight)
    # Few rows: Triton's kernel has a block for each segment, and adds them in another launch. (As a cluster's blocks,
    # which `launch` also knows, they take 1.0 to 1.8 times as long.)
    if not served or splits(m, n, multiprocessors(x.device)):
        return triton_segmented_linear(x, weight, bias, out_dtype, segments)
    out = torch.empty((m, n), dtype=out_dtype, device=x.device)
    with on_device(x):
        launch(
            x, weight, None if bias is None else bias.contiguous(), out, k // segments, SEGMENTED, tree=True
        )
    return out
