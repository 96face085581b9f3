"""What the flash-attention kernels for Hopper in Gluon share: tiles, descriptors, which program takes which tile."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mainspring.ops.triton.support import aligned

# Renamed after Triton 3.6.
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


# Keys or queries that a tile walks over, beyond which the hardware may as well start a program for each.
PERSISTENT_REACH = 8192
IMBALANCE = 1.06  # of the busiest program's share to the mean, up to which a fixed plan is worth its overlap


@dataclass(frozen=True)
class HopperTile:
    """Rows of a computing warpgroup, rows of a block that it walks over, computing warpgroups, blocks in flight, and
    the registers of a computing thread."""

    rows: int
    walk: int
    groups: int
    stages: int
    registers: int = 240


@functools.lru_cache(maxsize=1024)
def imbalance(each: int, items: int, programs: int) -> float:
    """The busiest program's work over the mean, if the i-th of a causal sequence's `each` tiles costs each + 1 - i.

    The tiles go to programs as `item_of` deals them out.
    """
    rounds = -(-items // programs)
    cost = torch.zeros(rounds * programs, dtype=torch.int64, device="cpu")
    cost[:items] = each + 1 - torch.arange(items, device="cpu") % each
    rows = cost.view(rounds, programs)
    share = rows[0::2].sum(0) + rows[1::2].flip(1).sum(0)
    return share.max().item() * programs / cost.sum().item()


def persists(reach: int, each: int, items: int, programs: int, causal: bool) -> bool:
    """Whether a program should take many items, dealt out beforehand, rather than one: then the next item's loads
    overlap with this one's work, but the hardware does not balance them. each: see `tiles_of`."""
    if items <= programs or reach > PERSISTENT_REACH:
        return False
    return not causal or each == 0 or imbalance(each, items, programs) <= IMBALANCE


def serves(*tensors: Tensor) -> bool:
    """Whether the Hopper kernels take such tensors [T, H, D]: they need warpgroup products and tensor descriptors."""
    x = tensors[0]
    return (
        x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(x.device)[0] == 9
        and all(aligned(t) and t.numel() > 0 for t in tensors)
    )


def hopper_padded(head_dim: int) -> int:
    """The size of a head in a tile. Descriptors fill the rest with zeros."""
    return max(64, 1 << (head_dim - 1).bit_length())


def head_rows(x: Tensor, rows: int) -> TensorDescriptor:
    """Blocks of `rows` tokens of one head of a packed [T, H, D]."""
    block = [rows, 1, hopper_padded(x.shape[2])]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, gl.NVMMASharedLayout(128, 16, 3))


def tiles_of(tokens: int, longest: int, num_seqs: int, size: int) -> tuple[int, int]:
    """(tiles in all, tiles of a sequence where all are equally long, or else 0). No sequence is longer than `longest`.

    Otherwise sequence s has the tiles from floor(cu[s] / size) + s on, of which the last may be empty.
    """
    if longest * num_seqs == tokens:
        each = -(-longest // size)
        return each * num_seqs, each
    return tokens // size + num_seqs, 0


@gluon.jit
def sequence_of(cu, num_seqs, tile, SIZE: gl.constexpr):
    """The sequence that owns a tile: sequence s owns tiles from floor(cu[s] / SIZE) + s on."""
    low = 0
    high = num_seqs - 1
    while low < high:
        middle = (low + high + 1) // 2
        if gl.load(cu + middle) // SIZE + middle <= tile:
            low = middle
        else:
            high = middle - 1
    return low


@gluon.jit
def locate(tile, cu, num_seqs, each, SIZE: gl.constexpr):
    """(sequence, its first token, its length, first row of the tile in it). each: see `tiles_of`."""
    if each > 0:
        s = tile // each
        start = gl.load(cu + s)
        row0 = (tile - s * each) * SIZE
    else:
        s = sequence_of(cu, num_seqs, tile, SIZE)
        start = gl.load(cu + s)
        row0 = (tile - (start // SIZE + s)) * SIZE
    return s, start, gl.load(cu + s + 1) - start, row0


@gluon.jit
def share_of(items):
    """How many of the items this program takes: its turns in `item_of`."""
    programs = gl.num_programs(0)
    rounds = (items + programs - 1) // programs
    last = item_of(rounds - 1)
    return rounds - (last >= items).to(gl.int32)


@gluon.jit
def item_of(turn):
    """The item of a turn. Every other round goes backwards: who had one of a sequence's long tiles gets a short one."""
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    return turn * programs + gl.where(turn % 2 == 0, program, programs - 1 - program)


@gluon.jit
def tanh(x):
    """By one exponential and one division: exact to the last bits of 1 for any finite x."""
    return 1.0 - 2.0 / (1.0 + gl.exp2(x * 2.885390081777927))


@gluon.jit
def key_blocks(
    row0,
    length,
    keys,
    window,
    TILE: gl.constexpr,
    WALK: gl.constexpr,
    CAUSAL: gl.constexpr,
    WINDOWED: gl.constexpr,
):
    """(last block of keys that queries row0 .. row0 + TILE see, those from it down that need a mask, those to walk)"""
    lead = keys - length  # position of the first query
    low = 0
    high = keys
    full = keys // WALK  # blocks before it are seen whole
    if CAUSAL:
        high = gl.minimum(keys, lead + gl.minimum(row0 + TILE, length))
        full = gl.minimum(full, gl.maximum(lead + row0 + 1, 0) // WALK)
    if WINDOWED:
        low = gl.maximum(lead + row0 + 1 - window, 0) // WALK
    last = gl.maximum((high + WALK - 1) // WALK, low + 1) - 1
    if row0 >= length:
        last = low
    blocks = last + 1 - low  # at least one, though it be masked whole
    masked = gl.minimum(gl.maximum(last + 1 - full, 1), blocks)
    if WINDOWED:
        masked = blocks
    return last, masked, blocks


@gluon.jit
def rounded(x, dtype: gl.constexpr):
    """x in bfloat16 or float16, two values an instruction, which the compiler does not find by itself."""
    if dtype == gl.bfloat16:
        result = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    else:
        result = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.float16, is_pure=True, pack=2
        )
    return result


@gluon.jit
def store_rows(
    values,
    staging,
    target,
    start,
    first,
    length,
    head,
    heads,
    HEAD_DIM: gl.constexpr,
    FIRST: gl.constexpr = 0,
):
    """A warpgroup's rows to columns FIRST .. of a packed [T, H, HEAD_DIM], through shared memory that it alone uses:
    16 bytes a store."""
    ROWS: gl.constexpr = staging.shape[0]
    DIM: gl.constexpr = staging.shape[1]
    WARPS: gl.constexpr = gl.num_warps()
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // DIM, DIM // 8], [WARPS, 1], [1, 0])
    staging.store(rounded(values, staging.dtype))
    result = staging.load(STORE)
    rows = first + gl.arange(0, ROWS, gl.SliceLayout(1, STORE))
    dims = FIRST + gl.expand_dims(gl.arange(0, DIM, gl.SliceLayout(0, STORE)), 0)
    offsets = gl.expand_dims(((start + rows).to(gl.int64) * heads + head) * HEAD_DIM, 1) + dims
    gl.store(target + offsets, result, gl.expand_dims(rows < length, 1) & (dims < HEAD_DIM))
