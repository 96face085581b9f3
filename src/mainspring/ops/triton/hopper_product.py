"""The products of Newton–Schulz iterations on Hopper, in Gluon: `product_kernel` of newton_schulz.py with roles.

One warp copies tiles of the operands, and of what is added to the product, into shared memory; two warpgroups
multiply. So the next tile's operands arrive while this one's result is rounded, stored and mirrored.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Renamed after Triton 3.6.
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
async_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
_NEW_NAMES = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))

ROWS, COLUMNS, STEP = 128, 256, 64
STAGES = 3
CHUNK = 64  # columns of a tile that are stored at once
_WARPS = 8
_REGISTERS = 168  # a thread's on entry: 65,536 over 12 warps
_LOADER_REGISTERS = 40


@gluon.jit
def _place(
    tile, tiles_each, rows, columns,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, GROUP: gl.constexpr, SYMMETRIC: gl.constexpr,
):  # fmt: skip
    """As in newton_schulz.py."""
    matrix = tile // tiles_each
    inside = tile % tiles_each
    if SYMMETRIC:
        SHARE: gl.constexpr = COLUMNS // ROWS
        square = inside // SHARE
        down = ((gl.sqrt_rn(8.0 * square.to(gl.float32) + 1.0) - 1.0) * 0.5).to(gl.int32)
        across = square - down * (down + 1) // 2
        row = down * COLUMNS + inside % SHARE * ROWS
        column = across * COLUMNS
        mirror_row = gl.where(across < down, column, rows)
    else:
        row_tiles = gl.cdiv(rows, ROWS)
        column_tiles = gl.cdiv(columns, COLUMNS)
        band = inside // (GROUP * column_tiles)
        band_rows = gl.minimum(row_tiles - band * GROUP, GROUP)
        rest = inside % (GROUP * column_tiles)
        row = (band * GROUP + rest % band_rows) * ROWS
        column = rest // band_rows * COLUMNS
        mirror_row = rows
    return matrix, row, column, mirror_row


@gluon.jit
def _copy_tiles(
    left, right, added, left_tiles, right_tiles, staged, full, empty, staged_full, staged_empty,
    tiles, tiles_each, rows, columns, steps,
    LEFT_ACROSS: gl.constexpr, RIGHT_ACROSS: gl.constexpr, ADD: gl.constexpr, SYMMETRIC: gl.constexpr,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, CHUNK: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """The loader: fills a stage as soon as its last readers are done."""
    stage = 0
    phase = 1  # of a fresh barrier the phase before the first counts as complete
    staged_phase = 1
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        matrix, row, column, _ = _place(tile, tiles_each, rows, columns, ROWS, COLUMNS, GROUP, SYMMETRIC)
        for k in range(steps):
            mbarrier.wait(empty.index(stage), phase)
            ready = full.index(stage)
            mbarrier.expect(ready, (ROWS + COLUMNS) * STEP * 2)
            if LEFT_ACROSS:
                async_load(left, [matrix, k * STEP, row], ready, left_tiles.index(stage))
            else:
                async_load(left, [matrix, row, k * STEP], ready, left_tiles.index(stage))
            if RIGHT_ACROSS:
                async_load(right, [matrix, k * STEP, column], ready, right_tiles.index(stage))
            else:
                async_load(right, [matrix, column, k * STEP], ready, right_tiles.index(stage))
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
            if ADD:  # noqa: SIM102 - a constant outside, a value inside
                # Late enough that the stores of the tile before are over.
                if k == steps // 2:
                    mbarrier.wait(staged_empty, staged_phase)
                    mbarrier.expect(staged_full, ROWS * COLUMNS * 2)
                    for chunk in gl.static_range(COLUMNS // CHUNK):
                        async_load(
                            added, [matrix, row, column + chunk * CHUNK], staged_full, staged.index(chunk)
                        )
        staged_phase ^= 1


@gluon.jit
def _halves(value):
    """The left and the right half of the columns."""
    ROWS: gl.constexpr = value.shape[0]
    COLUMNS: gl.constexpr = value.shape[1]
    return value.reshape((ROWS, 2, COLUMNS // 2)).permute((0, 2, 1)).split()


@gluon.jit
def _store_chunk(
    value, out, staged, matrix, row, column, factor, weight, diagonal, chunk: gl.constexpr, ADD: gl.constexpr,
    DIAGONAL: gl.constexpr, STORES: gl.constexpr,
):  # fmt: skip
    buffer = staged.index(chunk)
    if ADD:
        value += buffer.load(value.type.layout).to(gl.float32) * weight
    else:
        tma.store_wait(STORES - 1)  # the last store from this buffer has been read
    value *= factor
    if DIAGONAL:
        LAYOUT: gl.constexpr = value.type.layout
        i = row + gl.arange(0, value.shape[0], gl.SliceLayout(1, LAYOUT))
        j = column + gl.arange(0, value.shape[1], gl.SliceLayout(0, LAYOUT))
        value += gl.where(i[:, None] == j[None, :], diagonal, 0.0)
    rounded = value.to(out.dtype)
    buffer.store(rounded)
    fence_async_shared()
    async_store(out, [matrix, row, column], buffer)
    return rounded


@gluon.jit
def _mirror_chunk(
    rounded, mirrored, staged, matrix, row, column, chunk: gl.constexpr, MIRROR_LAYOUT: gl.constexpr,
    STORES: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = rounded.shape[0]
    CHUNK: gl.constexpr = rounded.shape[1]
    tma.store_wait(STORES - 1)
    buffer = staged.index(chunk)
    if _NEW_NAMES:
        buffer = buffer.reinterpret(mirrored.dtype, [CHUNK, ROWS], MIRROR_LAYOUT)
    else:
        buffer = buffer._reinterpret(mirrored.dtype, [CHUNK, ROWS], MIRROR_LAYOUT)
    buffer.store(rounded.permute((1, 0)))
    fence_async_shared()
    async_store(mirrored, [matrix, row, column], buffer)


@gluon.jit
def _multiply(
    left_tiles, right_tiles, full, acc, stage, phase, LEFT_ACROSS: gl.constexpr, RIGHT_ACROSS: gl.constexpr
):
    """Waits for a stage and starts its product."""
    mbarrier.wait(full.index(stage), phase)
    a = left_tiles.index(stage)
    b = right_tiles.index(stage)
    if LEFT_ACROSS:
        a = a.permute((1, 0))
    if not RIGHT_ACROSS:
        b = b.permute((1, 0))
    return warpgroup_mma(a, b, acc, is_async=True)


@gluon.jit
def _multiply_tiles(
    out, mirrored, scales, left_tiles, right_tiles, staged, full, empty, staged_full, staged_empty,
    tiles, tiles_each, rows, columns, steps, alpha, weight, diagonal,
    LEFT_ACROSS: gl.constexpr, RIGHT_ACROSS: gl.constexpr, ADD: gl.constexpr, SYMMETRIC: gl.constexpr,
    DIAGONAL: gl.constexpr, SCALE_POWER: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
    STAGES: gl.constexpr, CHUNK: gl.constexpr, GROUP: gl.constexpr, MIRROR_LAYOUT: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """The warpgroups that multiply."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, COLUMNS, 16])
    STORES: gl.constexpr = COLUMNS // CHUNK
    gl.static_assert(STORES == 4)
    stage = 0
    phase = 0
    staged_phase = 0
    first = True
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        matrix, row, column, mirror_row = _place(
            tile, tiles_each, rows, columns, ROWS, COLUMNS, GROUP, SYMMETRIC
        )  # fmt: skip
        factor = alpha
        if SCALE_POWER > 0:
            scale = gl.load(scales + matrix)
            factor *= scale if SCALE_POWER == 1 else scale * scale
        acc = gl.zeros((ROWS, COLUMNS), gl.float32, LAYOUT)
        acc = _multiply(left_tiles, right_tiles, full, acc, stage, phase, LEFT_ACROSS, RIGHT_ACROSS)
        if ADD:
            # The stores of the tile before end under this tile's first product.
            tma.store_wait(0)
            mbarrier.arrive(staged_empty, count=1, pred=not first)
            first = False
        before = stage
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
        for _ in range(1, steps):
            acc = _multiply(left_tiles, right_tiles, full, acc, stage, phase, LEFT_ACROSS, RIGHT_ACROSS)
            acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(acc,)))
            mbarrier.arrive(empty.index(before), count=1)
            before = stage
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(before), count=1)
        if ADD:
            mbarrier.wait(staged_full, staged_phase)
            staged_phase ^= 1
        low, high = _halves(acc)
        first0, first1 = _halves(low)
        first2, first3 = _halves(high)
        c0 = _store_chunk(
            first0, out, staged, matrix, row, column, factor, weight, diagonal, 0, ADD, DIAGONAL, STORES
        )  # fmt: skip
        c1 = _store_chunk(
            first1, out, staged, matrix, row, column + CHUNK, factor, weight, diagonal, 1, ADD, DIAGONAL, STORES
        )  # fmt: skip
        c2 = _store_chunk(
            first2, out, staged, matrix, row, column + 2 * CHUNK, factor, weight, diagonal, 2, ADD, DIAGONAL, STORES
        )  # fmt: skip
        c3 = _store_chunk(
            first3, out, staged, matrix, row, column + 3 * CHUNK, factor, weight, diagonal, 3, ADD, DIAGONAL, STORES
        )  # fmt: skip
        if SYMMETRIC:  # noqa: SIM102
            if mirror_row < rows:
                _mirror_chunk(c0, mirrored, staged, matrix, mirror_row, row, 0, MIRROR_LAYOUT, STORES)
                _mirror_chunk(c1, mirrored, staged, matrix, mirror_row + CHUNK, row, 1, MIRROR_LAYOUT, STORES)
                _mirror_chunk(
                    c2, mirrored, staged, matrix, mirror_row + 2 * CHUNK, row, 2, MIRROR_LAYOUT, STORES
                )
                _mirror_chunk(
                    c3, mirrored, staged, matrix, mirror_row + 3 * CHUNK, row, 3, MIRROR_LAYOUT, STORES
                )
    tma.store_wait(0)


@gluon.jit
def product_kernel(
    left, right, added, out, mirrored, scales, batch, tiles_each, rows, columns, depth, alpha, weight, diagonal,
    LEFT_ACROSS: gl.constexpr, RIGHT_ACROSS: gl.constexpr, ADD: gl.constexpr, SYMMETRIC: gl.constexpr,
    DIAGONAL: gl.constexpr, SCALE_POWER: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
    STEP: gl.constexpr, STAGES: gl.constexpr, CHUNK: gl.constexpr, GROUP: gl.constexpr, LOADER_REGISTERS: gl.constexpr, 
    num_warps: gl.constexpr,
):  # fmt: skip
    """out = alpha · scales^SCALE_POWER · (left @ right + weight · added) + diagonal · I; see newton_schulz.py."""
    LEFT: gl.constexpr = [STEP, ROWS] if LEFT_ACROSS else [ROWS, STEP]
    RIGHT: gl.constexpr = [STEP, COLUMNS] if RIGHT_ACROSS else [COLUMNS, STEP]
    TILE_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    left_tiles = gl.allocate_shared_memory(left.dtype, [STAGES, LEFT[0], LEFT[1]], TILE_LAYOUT)
    right_tiles = gl.allocate_shared_memory(right.dtype, [STAGES, RIGHT[0], RIGHT[1]], TILE_LAYOUT)
    staged = gl.allocate_shared_memory(out.dtype, [COLUMNS // CHUNK, ROWS, CHUNK], TILE_LAYOUT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    staged_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    staged_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    mbarrier.init(staged_full, count=1)
    mbarrier.init(staged_empty, count=1)
    tiles = batch * tiles_each
    steps = gl.cdiv(depth, STEP)
    gl.warp_specialize(
        [
            (_multiply_tiles, (
                out, mirrored, scales, left_tiles, right_tiles, staged, full, empty, staged_full, staged_empty,
                tiles, tiles_each, rows, columns, steps, alpha, weight, diagonal, LEFT_ACROSS, RIGHT_ACROSS, ADD,
                SYMMETRIC, DIAGONAL, SCALE_POWER, ROWS, COLUMNS, STAGES, CHUNK, GROUP, TILE_LAYOUT, num_warps,
            )),
            (_copy_tiles, (
                left, right, added, left_tiles, right_tiles, staged, full, empty, staged_full, staged_empty,
                tiles, tiles_each, rows, columns, steps, LEFT_ACROSS, RIGHT_ACROSS, ADD, SYMMETRIC,
                ROWS, COLUMNS, STEP, STAGES, CHUNK, GROUP,
            )),
        ],
        [1],
        [LOADER_REGISTERS],
    )  # fmt: skip


def product(
    left: Tensor,
    right: Tensor,
    added: Tensor | None,
    out: Tensor,
    scales: Tensor | None,
    *,
    blocks: int,
    tiles_each: int,
    depth: int,
    alpha: float,
    weight: float,
    diagonal: float,
    left_across: bool,
    right_across: bool,
    symmetric: bool,
    power: int,
) -> None:
    """Launches product_kernel over `blocks` multiprocessors; the arguments are newton_schulz.py's."""
    batch, rows, columns = out.shape

    def tiles_of(tensor: Tensor, height: int, width: int) -> Any:
        return TensorDescriptor.from_tensor(tensor, [1, height, width], gl.NVMMASharedLayout(128, 16, 3))

    product_kernel[(min(blocks, batch * tiles_each),)](
        tiles_of(left, *((STEP, ROWS) if left_across else (ROWS, STEP))),
        tiles_of(right, *((STEP, COLUMNS) if right_across else (COLUMNS, STEP))),
        None if added is None else tiles_of(added, ROWS, CHUNK),
        tiles_of(out, ROWS, CHUNK),
        tiles_of(out, CHUNK, ROWS) if symmetric else None,
        scales, batch, tiles_each, rows, columns, depth, alpha, weight, diagonal,
        LEFT_ACROSS=left_across, RIGHT_ACROSS=right_across, ADD=added is not None, SYMMETRIC=symmetric,
        DIAGONAL=diagonal != 0.0, SCALE_POWER=0 if scales is None else power, ROWS=ROWS, COLUMNS=COLUMNS,
        STEP=STEP, STAGES=STAGES,
        CHUNK=CHUNK, GROUP=8, LOADER_REGISTERS=_LOADER_REGISTERS, num_warps=_WARPS, maxnreg=_REGISTERS,
    )  # fmt: skip
