"""Flash attention backward for Hopper: the kernels of `flash_gluon_dkdv` and `flash_gluon_dq`, and their tiles."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mainspring.ops.triton.flash_gluon import (
    HopperTile,
    head_rows,
    hopper_padded,
    persists,
    tiles_of,
)
from mainspring.ops.triton.flash_gluon_dkdv import NARROW, dkdv_kernel
from mainspring.ops.triton.flash_gluon_dq import dq_kernel
from mainspring.ops.triton.support import multiprocessors


@dataclass(frozen=True)
class HopperBackwardTiles:
    """In the first kernel keys are the rows and queries are walked over, in the second the other way round."""

    dkdv: HopperTile
    dq: HopperTile


BACKWARD_TILES = {
    64: HopperBackwardTiles(HopperTile(64, 64, 2, 2), HopperTile(64, 128, 2, 2)),
    128: HopperBackwardTiles(HopperTile(64, 64, 2, 2), HopperTile(64, 64, 2, 2)),
    256: HopperBackwardTiles(HopperTile(64, 64, 2, 2), HopperTile(64, 32, 2, 2)),
}
LONG_BACKWARD_TILES = HopperBackwardTiles(HopperTile(64, 64, 3, 2, 160), HopperTile(64, 64, 3, 2, 160))


def backward_tiles(dim: int, reach: int, causal: bool) -> HopperBackwardTiles:
    """The tiles for a padded head size and the most keys that a query sees, by what was fastest on an H200."""
    if dim == 64 and reach > (8192 if causal else 2048):
        return LONG_BACKWARD_TILES
    return BACKWARD_TILES[dim]


def launch_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, terms: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, cu_q: Tensor,
    cu_k: Tensor, *, max_q: int, max_k: int, scale: float, factor: float, inner: float, causal: bool, window: int,
    tiles: HopperBackwardTiles | None = None, persistent: bool | None = None,
) -> None:  # fmt: skip
    """Fills dq, dk and dv. Arguments as those of `flash_attention_backward`, checked, with `serves` true; terms as
    `row_terms` gives them, factor and inner as for `launch_forward`."""
    d, heads, kv_heads = q.shape[2], q.shape[1], k.shape[1]
    dim = hopper_padded(d)
    reach = min(max_k, window or max_k)
    tiles = tiles or backward_tiles(dim, reach, causal)
    num_seqs, pitch, processors = cu_q.shape[0] - 1, terms.shape[2], multiprocessors(q.device)
    numbers = (cu_q, cu_k, scale, factor, inner, window, num_seqs, heads // kv_heads)
    constants = {"HEAD_DIM": d, "DIM": dim, "CAUSAL": causal, "WINDOWED": window > 0, "SOFTCAP": inner > 0}

    wide = dim > NARROW.value
    tile = tiles.dkdv
    count, each = tiles_of(k.shape[0], max_k, num_seqs, tile.rows * (1 if wide else tile.groups))
    items = count * kv_heads
    many = (
        persists(min(max_q, window or max_q), each, items, processors, causal)
        if persistent is None
        else persistent
    )
    flat = TensorDescriptor(terms, [terms.numel()], [1], [tile.walk], gl.NVMMASharedLayout(0, 32, 1))
    dkdv_kernel[(min(items, processors) if many else items,)](
        head_rows(q, tile.walk), head_rows(k, tile.rows), head_rows(v, tile.rows), head_rows(dout, tile.walk), flat, dk,
        dv, *numbers, kv_heads, heads * pitch, pitch, count, each, ROWS=tile.rows, WALK=tile.walk, GROUPS=tile.groups,
        STAGES=tile.stages, REGISTERS=tile.registers, **constants, num_warps=4,
    )  # fmt: skip

    tile = tiles.dq
    count, each = tiles_of(q.shape[0], max_q, num_seqs, tile.rows * tile.groups)
    items = count * heads
    many = persists(reach, each, items, processors, causal) if persistent is None else persistent
    many = many and not wide
    dq_kernel[(min(items, processors) if many else items,)](
        head_rows(q, tile.rows), head_rows(k, tile.walk), head_rows(v, tile.walk), head_rows(dout, tile.rows), terms,
        dq, *numbers, heads, heads * pitch, pitch, count, each, ROWS=tile.rows, WALK=tile.walk, GROUPS=tile.groups,
        STAGES=tile.stages, STAGED=not wide, REGISTERS=tile.registers, **constants, num_warps=4,
    )  # fmt: skip
