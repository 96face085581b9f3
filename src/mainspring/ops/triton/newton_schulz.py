"""Newton–Schulz iterations over a batch of matrices of one shape (see ops/muon.py for the mathematics).

One kernel serves the three products of a step. Gram matrices and their polynomials are symmetric: of them only
the tiles that touch the lower triangle are computed, and each is stored twice, the second time transposed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mainspring.ops.triton.support import has_tma, multiprocessors, on_device

Coefficients = tuple[float, float, float]
_GRAM_ASPECT = (
    1.2  # from which on Gram matrices save work: 6 α + 14 instead of 15 α + 5 products of small matrices
)
_MAX_GROWTH = 50.0  # of a small singular value until the Gram matrix is computed anew
_GRAM_SCALE = 256.0  # keeps the elements of a Gram matrix of norm 1 within the normal numbers of float16
ROW_ALIGNMENT = (
    8  # elements: rows of 16-bit workspaces start at multiples of 16 bytes, as tensor descriptors ask
)


@dataclass(frozen=True)
class Tile:
    """Shape of a block's work. rows, columns: of the product (columns a multiple of rows), k: depth of a step."""

    rows: int
    columns: int
    k: int
    warps: int
    stages: int
    blocks: int = 1  # that share a multiprocessor


# Each with its relative throughput, measured on an H200.
_ROLES_TILE = Tile(128, 256, 64, 8, 3)  # that of hopper_product.py too
_CHOICES = (
    (_ROLES_TILE, 1.0),
    (Tile(128, 128, 64, 8, 3), 0.85),
    (Tile(64, 64, 64, 4, 4, 2), 0.5),
)
_PLAIN_TILE = Tile(32, 32, 32, 4, 2)
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _load_tile(
    source, matrix, row, column, rows, columns, pitch,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLUMNS] of a matrix of the batch, zeros outside. pitch: elements from a row to the next."""
    if TMA:
        tile = source.load([matrix, row, column]).reshape(ROWS, COLUMNS)
    else:
        i = (row + tl.arange(0, ROWS))[:, None]
        j = (column + tl.arange(0, COLUMNS))[None, :]
        offset = (matrix.to(tl.int64) * rows + i) * pitch + j
        tile = tl.load(source + offset, (i < rows) & (j < columns), 0.0)
    return tile


@triton.jit
def _store_tile(
    target, value, matrix, row, column, rows, columns, pitch,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    if TMA:
        target.store([matrix, row, column], value.reshape(1, ROWS, COLUMNS))
    else:
        i = (row + tl.arange(0, ROWS))[:, None]
        j = (column + tl.arange(0, COLUMNS))[None, :]
        offset = (matrix.to(tl.int64) * rows + i) * pitch + j
        tl.store(target + offset, value, (i < rows) & (j < columns))


@triton.jit
def _finish(
    value, added, out, mirrored, matrix, row, column, mirror_row, rows, columns, pitch, factor, weight, diagonal,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ADD: tl.constexpr, SYMMETRIC: tl.constexpr,
    DIAGONAL: tl.constexpr, DTYPE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Stores a part of a tile, finished, and its transpose at `mirror_row`, where nothing is stored outside."""
    if ADD:
        tile = _load_tile(added, matrix, row, column, rows, columns, pitch, ROWS, COLUMNS, TMA)
        value += tile.to(tl.float32) * weight
    value *= factor
    if DIAGONAL:
        i = row + tl.arange(0, ROWS)
        j = column + tl.arange(0, COLUMNS)
        value += tl.where(i[:, None] == j[None, :], diagonal, 0.0)
    value = value.to(DTYPE)
    _store_tile(out, value, matrix, row, column, rows, columns, pitch, ROWS, COLUMNS, TMA)
    if SYMMETRIC:
        _store_tile(mirrored, value.T, matrix, mirror_row, row, rows, columns, pitch, COLUMNS, ROWS, TMA)


@triton.jit
def _place(
    tile, tiles_each, rows, columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, SYMMETRIC: tl.constexpr,
):  # fmt: skip
    """(matrix, first row, first column, row to mirror the tile to: outside if not at all) of a tile's number."""
    matrix = tile // tiles_each
    inside = tile % tiles_each
    if SYMMETRIC:
        # Squares of COLUMNS² along the lower triangle, row by row; each holds SHARE tiles, one below the other.
        SHARE: tl.constexpr = COLUMNS // ROWS
        square = inside // SHARE
        # Exact: 8 s + 1 is a whole square where the root is a whole number, and otherwise far enough from one.
        down = ((tl.sqrt_rn(8.0 * square.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
        across = square - down * (down + 1) // 2
        row = down * COLUMNS + inside % SHARE * ROWS
        column = across * COLUMNS
        mirror_row = tl.where(across < down, column, rows)
    else:
        # Bands of GROUP tiles of rows share the columns that are in the L2 cache.
        row_tiles = tl.cdiv(rows, ROWS)
        column_tiles = tl.cdiv(columns, COLUMNS)
        band = inside // (GROUP * column_tiles)
        band_rows = min(row_tiles - band * GROUP, GROUP)
        rest = inside % (GROUP * column_tiles)
        row = (band * GROUP + rest % band_rows) * ROWS
        column = rest // band_rows * COLUMNS
        mirror_row = rows
    return matrix, row, column, mirror_row


@triton.jit
def product_kernel(
    left, right, added, out, mirrored, scales, batch, tiles_each, rows, columns, depth,
    left_rows, left_columns, left_pitch, right_rows, right_columns, right_pitch, pitch, alpha, weight, diagonal,
    LEFT_ACROSS: tl.constexpr, RIGHT_ACROSS: tl.constexpr, ADD: tl.constexpr, SYMMETRIC: tl.constexpr,
    DIAGONAL: tl.constexpr, SCALE_POWER: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """out = alpha · scales^SCALE_POWER · (left @ right + weight · added) + diagonal · I for each matrix; persistent.

    left is stored as [rows, depth], or [depth, rows] if LEFT_ACROSS; right as [columns, depth], or
    [depth, columns] if RIGHT_ACROSS. out, added: [rows, columns]. All with rows of `pitch` elements.
    """
    tiles = batch * tiles_each
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        matrix, row, column, mirror_row = _place(
            tile, tiles_each, rows, columns, ROWS, COLUMNS, GROUP, SYMMETRIC
        )  # fmt: skip
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, depth, STEP):
            if LEFT_ACROSS:
                a = _load_tile(left, matrix, k, row, left_rows, left_columns, left_pitch, STEP, ROWS, TMA).T
            else:
                a = _load_tile(left, matrix, row, k, left_rows, left_columns, left_pitch, ROWS, STEP, TMA)
            if RIGHT_ACROSS:
                b = _load_tile(
                    right, matrix, k, column, right_rows, right_columns, right_pitch, STEP, COLUMNS, TMA
                )
            else:
                b = _load_tile(
                    right, matrix, column, k, right_rows, right_columns, right_pitch, COLUMNS, STEP, TMA
                ).T
            acc = tl.dot(a, b, acc, input_precision="ieee")
        factor = alpha
        if SCALE_POWER > 0:
            scale = tl.load(scales + matrix)
            factor *= scale if SCALE_POWER == 1 else scale * scale
        if TMA:
            # In two halves: what a tile's output takes of shared memory is a stage of the inputs less.
            HALF: tl.constexpr = COLUMNS // 2
            first, second = tl.split(tl.permute(tl.reshape(acc, (ROWS, 2, HALF)), (0, 2, 1)))
            _finish(
                first, added, out, mirrored, matrix, row, column, mirror_row, rows, columns, pitch, factor, weight,
                diagonal, ROWS, HALF, ADD, SYMMETRIC, DIAGONAL, DTYPE, TMA,
            )  # fmt: skip
            _finish(
                second, added, out, mirrored, matrix, row, column + HALF, mirror_row + HALF, rows, columns, pitch,
                factor, weight, diagonal, ROWS, HALF, ADD, SYMMETRIC, DIAGONAL, DTYPE, TMA,
            )  # fmt: skip
        else:
            _finish(
                acc, added, out, mirrored, matrix, row, column, mirror_row, rows, columns, pitch, factor, weight,
                diagonal, ROWS, COLUMNS, ADD, SYMMETRIC, DIAGONAL, DTYPE, TMA,
            )  # fmt: skip


def workspace(batch: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[batch, rows, columns], uninitialised, whose rows start where a tensor descriptor may read them."""
    pitch = triton.cdiv(columns, ROW_ALIGNMENT) * ROW_ALIGNMENT
    return torch.empty((batch, rows, pitch), dtype=dtype, device=device)[:, :, :columns]


def workspace_bytes(rows: int, columns: int) -> int:
    """What `newton_schulz` and its input take for one matrix at most: two copies of it, five Gram matrices."""
    small = min(rows, columns)
    return 2 * (2 * rows * columns + 5 * small * small)


def newton_schulz(x: Tensor, scales: Tensor, coefficients: Sequence[Coefficients]) -> Tensor:
    """X <- a X + (b G + c G²) X with G = X Xᵀ (or, for tall X, on its other side) for each (a, b, c).

    Long matrices take several steps on G alone: with S = a I + b G + c G² a step is X <- S X and G <- S G S, so
    X need be multiplied only at the end, by the product of the S ("Gram Newton-Schulz", Zhang, Amsel, Chen and
    Dao, 2026). Rounding errors of G grow with what the small singular values are magnified by; so G is kept in
    float16, and X is multiplied and G computed anew before they pass those of the plain steps in bfloat16.

    Args:
        x: [B, rows, columns] from `workspace`, bfloat16 (float32 in the interpreter), overwritten.
        scales: [B] float32; the first X is scales · x.
        coefficients: one (a, b, c) a step; at least one.

    Returns:
        The last X: x or another tensor like it.
    """
    other = workspace(x.shape[0], x.shape[1], x.shape[2], x.dtype, x.device)
    small = min(x.shape[1:])
    narrow = x.dtype if x.dtype == torch.float32 else torch.float16
    spare = [workspace(x.shape[0], small, small, narrow, x.device) for _ in range(5)]
    first: Tensor | None = scales
    for segment in _segments(coefficients, max(x.shape[1:]) / small):
        if len(segment) == 1:
            _plain_step(x, other, spare[0].view(x.dtype), spare[1].view(x.dtype), first, segment[0])
        else:
            _gram_steps(x, other, spare, first, segment)
        x, other, first = other, x, None
    return x


def _segments(coefficients: Sequence[Coefficients], aspect: float) -> list[list[Coefficients]]:
    """The steps, those together that are to be taken on the Gram matrix."""
    segments: list[list[Coefficients]] = []
    growth = float("inf")
    for step in coefficients:
        growth *= step[0]
        if aspect < _GRAM_ASPECT or growth > _MAX_GROWTH:
            segments.append([])
            growth = step[0]
        segments[-1].append(step)
    return segments


def _plain_step(
    x: Tensor, out: Tensor, gram: Tensor, polynomial: Tensor, scales: Tensor | None, step: Coefficients
) -> None:
    a, b, c = step
    tall = x.shape[1] > x.shape[2]
    _product(x, x, gram, left_across=tall, right_across=tall, symmetric=True, scales=scales, power=2)
    _product(gram, gram, polynomial, added=gram, alpha=c, weight=b / c, symmetric=True)
    left, right = (x, polynomial) if tall else (polynomial, x)
    _product(left, right, out, added=x, weight=a, right_across=not tall, scales=scales, power=1)


def _gram_steps(
    x: Tensor, out: Tensor, spare: Sequence[Tensor], scales: Tensor | None, steps: Sequence[Coefficients]
) -> None:
    tall = x.shape[1] > x.shape[2]
    gram, half, factor, total, other = (
        spare  # G, S G, S, the product of the S so far, a place for the next one
    )
    _product(
        x, x, gram, alpha=_GRAM_SCALE, left_across=tall, right_across=tall, symmetric=True, scales=scales, power=2
    )  # fmt: skip
    for i, (a, b, c) in enumerate(steps):
        target = factor if i else total
        _product(
            gram, gram, target, added=gram, alpha=c / _GRAM_SCALE**2, weight=b * _GRAM_SCALE / c, diagonal=a,
            symmetric=True,
        )  # fmt: skip
        last = i == len(steps) - 1
        if i:
            _product(factor, total, other.view(x.dtype) if last else other, symmetric=True)
            total, other = other, total
        if not last:
            _product(target, gram, half, symmetric=True)
            _product(half, target, gram, symmetric=True)
    left, right = (x, total.view(x.dtype)) if tall else (total.view(x.dtype), x)
    _product(left, right, out, right_across=not tall, scales=scales, power=1)


@lru_cache(maxsize=64)
def _has_roles(device: torch.device) -> bool:
    """Whether hopper_product.py serves: its instructions are Hopper's alone, its language began with Triton 3.6."""
    version = tuple(int(n) for n in triton.__version__.split(".")[:2])
    return version >= (3, 6) and torch.cuda.get_device_capability(device)[0] == 9


@lru_cache(maxsize=1024)
def choose_tile(batch: int, rows: int, columns: int, processors: int) -> Tile:
    """The tile with the least time by a simple model: waves of blocks times the area of a tile."""

    def cost(choice: tuple[Tile, float]) -> float:
        tile, speed = choice
        tiles = batch * -(-rows // tile.rows) * -(-columns // tile.columns)
        waves = -(-tiles // (processors * tile.blocks))
        return waves * tile.blocks * tile.rows * tile.columns / speed

    return min(_CHOICES, key=cost)[0]


def _product(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    *,
    added: Tensor | None = None,
    alpha: float = 1.0,
    weight: float = 0.0,
    diagonal: float = 0.0,
    left_across: bool = False,
    right_across: bool = False,
    symmetric: bool = False,
    scales: Tensor | None = None,
    power: int = 0,
    tile: Tile | None = None,
    roles: bool | None = None,
) -> None:
    """See product_kernel. tile, roles: another tile or kernel than the chosen one, for tests and benchmarks."""
    batch, rows, columns = out.shape
    depth = left.shape[1] if left_across else left.shape[2]
    tma = has_tma(out.device) and out.dtype != torch.float32
    processors = multiprocessors(out.device)
    if roles:
        tile = _ROLES_TILE
    elif roles is None:
        roles = tile is None and tma and _has_roles(out.device)
    tile = tile or (choose_tile(batch, rows, columns, processors) if tma else _PLAIN_TILE)
    if symmetric:
        squares = triton.cdiv(rows, tile.columns)
        tiles_each = squares * (squares + 1) // 2 * (tile.columns // tile.rows)
    else:
        tiles_each = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)

    def tiles_of(tensor: Tensor, height: int, width: int) -> Any:
        return TensorDescriptor.from_tensor(tensor, [1, height, width]) if tma else tensor

    half = tile.columns // 2
    if roles and tile == _ROLES_TILE:
        from mainspring.ops.triton.hopper_product import product

        with on_device(out):
            product(
                left, right, added, out, scales, blocks=processors, tiles_each=tiles_each, depth=depth, alpha=alpha,
                weight=weight, diagonal=diagonal, left_across=left_across, right_across=right_across,
                symmetric=symmetric, power=power,
            )  # fmt: skip
        return
    with on_device(out):
        product_kernel[(min(batch * tiles_each, processors * tile.blocks),)](
            tiles_of(left, *((tile.k, tile.rows) if left_across else (tile.rows, tile.k))),
            tiles_of(right, *((tile.k, tile.columns) if right_across else (tile.columns, tile.k))),
            None if added is None else tiles_of(added, tile.rows, half),
            tiles_of(out, tile.rows, half),
            tiles_of(out, half, tile.rows) if symmetric else None,
            scales, batch, tiles_each, rows, columns, depth, left.shape[1], left.shape[2], left.stride(1),
            right.shape[1], right.shape[2], right.stride(1), out.stride(1), alpha, weight, diagonal,
            LEFT_ACROSS=left_across, RIGHT_ACROSS=right_across, ADD=added is not None, SYMMETRIC=symmetric,
            DIAGONAL=diagonal != 0.0, SCALE_POWER=0 if scales is None else power, DTYPE=_DTYPES[out.dtype],
            ROWS=tile.rows, COLUMNS=tile.columns, STEP=tile.k, GROUP=8, TMA=tma, FLATTEN=tma,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
