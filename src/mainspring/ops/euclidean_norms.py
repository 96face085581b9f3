"""Euclidean norms of many tensors, for clipping: as exact for a large one as for a small one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mainspring.ops.precision import accumulator

_CHUNK = 1 << 14


@torch.no_grad()
def euclidean_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Of each tensor, [n] float64.

    On a GPU by torch's own kernel, which adds in a tree. torch's CPU kernel adds float32 squares in one chain for each
    vector lane: of 28 million numbers it loses 1.5 parts in a thousand. There squares are added in short pieces, and
    the pieces in float64.
    """
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    if tensors[0].is_cuda:
        wide = accumulator(tensors[0].dtype)
        return torch.stack(list(torch._foreach_norm(list(tensors), 2, dtype=wide))).to(torch.float64)
    return torch.stack([_norm(tensor) for tensor in tensors])


def _norm(tensor: Tensor) -> Tensor:
    wide = accumulator(tensor.dtype)
    chunks = (chunk.to(wide) for chunk in tensor.reshape(-1).split(_CHUNK))
    squares = [torch.dot(chunk, chunk) for chunk in chunks]
    return torch.stack(squares).sum(dtype=torch.float64).sqrt()
