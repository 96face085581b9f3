"""A decode step's look-ups in the engine's tables: see `ops.decode_inputs`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mainspring.ops.triton.support import on_device

_BLOCK = 512
_ROWS = 128


@triton.jit(do_not_specialize=["count", "width"])
def decode_inputs_kernel(
    rows, tokens, blocks, out_tokens, slots, next_positions, context_lens, block_tables,
    rows_stride, count, width, token_stride, block_stride, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (N, pieces of a block table). rows: [3, N], rows_stride apart."""
    row = tl.program_id(0)
    seat = tl.load(rows + row)
    position = tl.load(rows + rows_stride + row)
    block = tl.load(rows + 2 * rows_stride + row)
    place = position // BLOCK_SIZE
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(blocks + seat * block_stride + index, index < width, 0)
    # The block that is entered here may not be in the table yet.
    values = tl.where(index == place, block.to(tl.int32), values)
    tl.store(block_tables + row.to(tl.int64) * width + index, values, index < width)
    if tl.program_id(1) == 0:
        tl.store(blocks + seat * block_stride + place, block.to(tl.int32))
        tl.store(out_tokens + row, tl.load(tokens + seat * token_stride + position).to(tl.int64))
        tl.store(slots + row, block * BLOCK_SIZE + position % BLOCK_SIZE)
        tl.store(next_positions + row, position + 1)
        tl.store(context_lens + row, (position + 1).to(tl.int32))


@triton.jit(do_not_specialize=["count"])
def put_tokens_kernel(table, seats, positions, tokens, count, stride, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < count
    place = tl.load(seats + row, inside, 0) * stride + tl.load(positions + row, inside, 0)
    tl.store(table + place, tl.load(tokens + row, inside, 0).to(tl.int32), inside)


def decode_inputs(
    rows: Tensor, tokens: Tensor, blocks: Tensor, block_size: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(tokens, slots, next_positions, context_lens, block_tables) of `ops.DecodeInputs`; checked by the caller."""
    count, device = rows.shape[1], rows.device
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    found, slots, after = torch.empty((3, count), dtype=torch.int64, device=device)
    context_lens = torch.empty(count, dtype=torch.int32, device=device)
    tables = torch.empty((count, width), dtype=torch.int32, device=device)
    if count:
        with on_device(rows):
            decode_inputs_kernel[(count, triton.cdiv(width, _BLOCK))](
                rows, tokens, blocks, found, slots, after, context_lens, tables, rows.stride(0), count, width,
                tokens.stride(0), blocks.stride(0), BLOCK_SIZE=block_size, BLOCK=_BLOCK,
            )  # fmt: skip
    return found, slots, after, context_lens, tables


def put_tokens(table: Tensor, seats: Tensor, positions: Tensor, tokens: Tensor) -> None:
    """table[seats[n], positions[n]] = tokens[n]."""
    count = seats.shape[0]
    if count:
        with on_device(table):
            put_tokens_kernel[(triton.cdiv(count, _ROWS),)](
                table, seats.contiguous(), positions.contiguous(), tokens.contiguous(), count, table.stride(0),
                ROWS=_ROWS,
            )  # fmt: skip
