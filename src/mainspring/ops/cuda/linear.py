"""y = x Wᵀ + b for Hopper (csrc/cuda/linear.cu), with the bits of `triton.linear`: the same chains of products.

Its tiles fill the chip in one wave where rows are few; products of many rows are left to the Triton kernel, whose
blocks walk over several tiles each.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mainspring.ops.cuda import compiler

SOURCE = "linear.cu"
GROUP_ROWS = 64  # rows of a warpgroup's product
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
    stages: int = 32
    blocks: int = 1
    prefetch: int | None = 0
    late: bool = False


@lru_cache(maxsize=256)
def _launcher(dtype: torch.dtype, groups: int, columns: int, panels: int) -> tuple[ctypes.CDLL, Any]:
    defines = (
        ("MAINSPRING_TYPE", TYPES[dtype]), ("MAINSPRING_GROUPS", groups), ("MAINSPRING_COLUMNS", columns),
        ("MAINSPRING_PANELS", panels),
    )  # fmt: skip
    library = compiler.load(SOURCE, defines)
    function = library.mainspring_linear
    pointer, wide, word = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    function.argtypes = [pointer, wide, pointer, wide, pointer, pointer, *[word] * 10, pointer]
    function.restype = word
    return library, function


def launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, chunk: int, tile: Tile, tree: bool = False
) -> None:
    """One launch. x: [M, K], weight: [N, K], rows 16-byte aligned; out: [M, N], contiguous; on the current device."""
    (m, k), n = x.shape, weight.shape[0]
    library, function = _launcher(x.dtype, tile.groups, tile.columns, tile.panels)
    code = function(
        x.data_ptr(), x.stride(0), weight.data_ptr(), weight.stride(0), None if bias is None else bias.data_ptr(),
        out.data_ptr(), m, n, k, chunk, tree, out.dtype == torch.float32, tile.stages, tile.blocks,
        0 if tile.prefetch is None else 1 + tile.prefetch, tile.late, torch.cuda.current_stream().cuda_stream,
    )  # fmt: skip
    compiler.check(library, "linear", code)
