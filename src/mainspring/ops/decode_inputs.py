"""What a decode step needs of the engine's tables on the device, in one launch before the model and one after it.

The tables have a row for each seat: tokens [S, P] int32 by position, blocks [S, B] int32 of the KV cache in order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mainspring.errors import BackendError
from mainspring.ops.checks import check_indices, described
from mainspring.ops.policy import LOCKSTEP, Policy
from mainspring.ops.registry import Call, Implementation, Operation
from mainspring.ops.triton.support import refuses as triton_refuses


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """Of N rows that compute one token each.

    tokens: [N] int64, to be computed; slots: [N] int64, where their keys go; next_positions: [N] int64 and
    context_lens: [N] int32, one more than their positions; block_tables: [N, W] int32.
    """

    tokens: Tensor
    slots: Tensor
    next_positions: Tensor
    context_lens: Tensor
    block_tables: Tensor


def decode_inputs(
    rows: Tensor, tokens: Tensor, blocks: Tensor, block_size: int, width: int, *, policy: Policy = LOCKSTEP
) -> DecodeInputs:
    """Enter each row's block into the table of blocks, and look up all that its token needs.

    rows: [3, N] int64: a seat, a position, and the block that holds that position's keys (seats may repeat only with
    equal positions and blocks). tokens, blocks: the tables. width: W, of the block tables. Raises BackendError.
    """
    if rows.dim() != 2 or rows.shape[0] != 3 or rows.dtype is not torch.int64:
        raise BackendError(
            f"decode_inputs: rows must be [3, N] int64, not {tuple(rows.shape)} of {rows.dtype}"
        )
    for name, table in (("tokens", tokens), ("blocks", blocks)):
        if table.dim() != 2 or table.dtype is not torch.int32 or not table.is_contiguous():
            raise BackendError(f"decode_inputs: {name} must be a contiguous table of int32")
    if not 0 < width <= blocks.shape[1]:
        raise BackendError(f"decode_inputs: width {width} must lie between 1 and {blocks.shape[1]}")
    if block_size < 1 or not rows.device == tokens.device == blocks.device:
        raise BackendError(
            f"decode_inputs: blocks must hold 1 key or more, not {block_size}, and all be on one device, not on "
            f"{rows.device}, {tokens.device} and {blocks.device}"
        )
    check_indices("decode_inputs", "seat", rows[0], min(tokens.shape[0], blocks.shape[0]))
    check_indices("decode_inputs", "position", rows[1], min(tokens.shape[1], blocks.shape[1] * block_size))
    return DECODE_INPUTS.select(rows, policy)(rows, tokens, blocks, block_size, width)


def put_tokens(
    table: Tensor, seats: Tensor, positions: Tensor, tokens: Tensor, *, policy: Policy = LOCKSTEP
) -> None:
    """table[seats[n], positions[n]] = tokens[n]. table: [S, P] int32, contiguous; the others [N] int64.

    Raises BackendError.
    """
    if table.dim() != 2 or table.dtype is not torch.int32 or not table.is_contiguous():
        raise BackendError("put_tokens: the table must be a contiguous [S, P] of int32")
    for name, index in (("seats", seats), ("positions", positions), ("tokens", tokens)):
        if index.dtype is not torch.int64 or index.shape != seats.shape[:1] or index.device != table.device:
            raise BackendError(
                f"put_tokens: {name} must be {list(seats.shape[:1])} int64 on {table.device}, not {described(index)}"
            )
    check_indices("put_tokens", "seat", seats, table.shape[0])
    check_indices("put_tokens", "position", positions, table.shape[1])
    PUT_TOKENS.select(table, policy)(table, seats, positions, tokens)


def reference(rows: Tensor, tokens: Tensor, blocks: Tensor, block_size: int, width: int) -> DecodeInputs:
    seats, positions, own = rows
    blocks[seats, positions // block_size] = own.to(torch.int32)
    after = positions + 1
    return DecodeInputs(
        tokens=tokens[seats, positions].to(torch.int64),
        slots=own * block_size + positions % block_size,
        next_positions=after,
        context_lens=after.to(torch.int32),
        block_tables=blocks[:, :width][seats],
    )


def put_reference(table: Tensor, seats: Tensor, positions: Tensor, tokens: Tensor) -> None:
    table[seats, positions] = tokens.to(torch.int32)


def _triton(rows: Tensor, tokens: Tensor, blocks: Tensor, block_size: int, width: int) -> DecodeInputs:
    from mainspring.ops.triton.decode_inputs import decode_inputs as kernel

    return DecodeInputs(*kernel(rows, tokens, blocks, block_size, width))


def _triton_put(table: Tensor, seats: Tensor, positions: Tensor, tokens: Tensor) -> None:
    from mainspring.ops.triton.decode_inputs import put_tokens as kernel

    kernel(table, seats, positions, tokens)


def _refuses(call: Call) -> str | None:
    """The kernels move integers, whatever the dtype of the call's tensor."""
    return triton_refuses(replace(call, dtype=torch.float32))


DECODE_INPUTS = Operation(
    "decode_inputs",
    Implementation("triton", _triton, _refuses),
    Implementation("reference", reference, lambda call: None),
)
PUT_TOKENS = Operation(
    "put_tokens",
    Implementation("triton", _triton_put, _refuses),
    Implementation("reference", put_reference, lambda call: None),
)
