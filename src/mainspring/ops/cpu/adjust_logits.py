"""`ops.adjust_logits` for the CPU: masks are unpacked by the byte, and penalties touch what was seen only."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mainspring.ops.sampling_tensors import SamplingTensors


def adjust_logits(
    logits: Tensor,
    params: SamplingTensors,
    seats: Tensor,
    history: Tensor | None,
    bias: Tensor | None,
    bitmask: Tensor | None,
) -> Tensor:
    """See `ops.adjust_logits.adjust_logits`; all tensors on the CPU."""
    result = logits.clone(memory_format=torch.contiguous_format)
    rows = result.numpy()
    vocab_size = rows.shape[1]
    if bitmask is not None:
        words = np.ascontiguousarray(bitmask.numpy()).view(np.uint8)
        allowed = np.unpackbits(words, axis=1, count=vocab_size, bitorder="little")
        result.masked_fill_(torch.from_numpy(allowed).view(torch.bool).logical_not_(), -torch.inf)
    for row, seat in zip(rows, seats.tolist(), strict=True):
        if bias is not None and params.biased[seat]:
            row += bias[seat].numpy()
        if history is not None:
            repetition, presence, frequency = (
                np.float32(tensor[seat]) for tensor in (params.repetition, params.presence, params.frequency)
            )
            if repetition == 1 and presence == 0 and frequency == 0:
                continue
            seen = history[seat].numpy()
            tokens = np.flatnonzero(seen)
            count = (seen[tokens] >> 1).astype(np.float32)
            z = row[tokens]
            z = np.where(z > 0, z / repetition, z * repetition)
            row[tokens] = z - frequency * count - presence * (count > 0)
    return result
