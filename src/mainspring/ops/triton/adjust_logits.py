"""`ops.adjust_logits` on the GPU, in one pass; what a row has no use for is not read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mainspring.ops.sampling_tensors import ROW_WORDS, SamplingTensors
from mainspring.ops.triton.support import on_device, require

_TILE = 2048
_WARPS = 4
_WORDS: tl.constexpr = tl.constexpr(ROW_WORDS)


@triton.jit(do_not_specialize=["stride", "mask_stride"])
def adjust_kernel(
    logits, rows_of_seats, seats, history, bias, bitmask, out, stride, mask_stride,
    V: tl.constexpr, HISTORY: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Grid: (rows, tiles of a row)."""
    row = tl.program_id(0).to(tl.int64)
    seat = tl.load(seats + row)
    words = rows_of_seats + seat * _WORDS
    fields = words.to(tl.pointer_type(tl.float32))
    index = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = index < V
    z = tl.load(logits + row * stride + index, inside, 0.0)
    if MASK:
        word = tl.load(bitmask + row * mask_stride + index // 32, inside, 0)
        z = tl.where(((word >> (index % 32)) & 1) != 0, z, float("-inf"))
    if BIAS:  # noqa: SIM102 (the one is decided when the kernel is compiled)
        if tl.load(words.to(tl.pointer_type(tl.int32)) + 9) != 0:
            z += tl.load(bias + seat * V + index, inside, 0.0)
    if HISTORY:
        repetition = tl.load(fields + 6)
        presence = tl.load(fields + 7)
        frequency = tl.load(fields + 8)
        if (repetition != 1.0) | (presence != 0.0) | (frequency != 0.0):
            seen = tl.load(history + seat * V + index, inside, 0)
            count = (seen >> 1).to(tl.float32)
            z = tl.where(seen > 0, tl.where(z > 0, z / repetition, z * repetition), z)
            z = z - frequency * count
            z = z - tl.where(count > 0, presence, 0.0)
    tl.store(out + row * V + index, z, inside)


def adjust_logits(
    logits: Tensor,
    params: SamplingTensors,
    seats: Tensor,
    history: Tensor | None,
    bias: Tensor | None,
    bitmask: Tensor | None,
) -> Tensor:
    """See `ops.adjust_logits.adjust_logits`.

    Raises:
        BackendError: a tensor whose rows are not contiguous.
    """
    rows, v = logits.shape
    for name, tensor in (("logits", logits), ("history", history), ("bias", bias), ("bitmask", bitmask)):
        contiguous = tensor is None or tensor.shape[1] == 1 or tensor.stride(1) == 1
        require("adjust_logits", contiguous, f"the last dimension of {name} must be contiguous")
    out = torch.empty((rows, v), dtype=torch.float32, device=logits.device)
    if rows:
        with on_device(logits):
            adjust_kernel[(rows, triton.cdiv(v, _TILE))](
                logits, params.rows, seats, history, bias, bitmask, out, logits.stride(0),
                0 if bitmask is None else bitmask.stride(0), V=v, HISTORY=history is not None,
                BIAS=bias is not None, MASK=bitmask is not None, TILE=_TILE, num_warps=_WARPS,
            )  # fmt: skip
    return out
