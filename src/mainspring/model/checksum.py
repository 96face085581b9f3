"""A checksum of weights that has no order: processes that hold other parts of a model come to the same one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

_CHUNK = 1 << 22  # elements that are widened to 64 bits at a time: 96 MB with what is made of them
_FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)  # odd: no factor below is even, and each bit of a value counts


def digest_of_sums(sums: Iterable[tuple[str, tuple[int, ...], torch.dtype, int]]) -> str:
    """128 bits of the names, shapes, dtypes and `sum_of_bits` of all tensors, in hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for name, shape, dtype, total in sorted(sums, key=lambda item: item[0]):
        digest.update(repr((name, shape, str(dtype), total)).encode())
    return digest.hexdigest()


def sum_of_bits(tensor: Tensor, *, first: int = 0, width: int | None = None) -> Tensor:
    """An element's bits times its place's factor, summed: an int64 scalar. Of a part of a larger tensor its term.

    first: the place of tensor's first element; width: the row length of the whole, if it is longer than tensor's.
    """
    words = (
        tensor.contiguous().view(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])
    )
    columns = tensor.shape[-1] if tensor.dim() > 1 else 1
    gap = 0 if width is None else width - columns  # elements of the whole between two rows of the part
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, words.numel(), _CHUNK):
        chunk = words[start : start + _CHUNK].to(torch.int64, copy=True)
        place = torch.arange(start, start + chunk.numel(), device=tensor.device)
        if gap:
            place += gap * torch.div(place, columns, rounding_mode="floor")
        total += chunk.mul_(place.add_(first).mul_(2).mul_(_FACTOR).add_(1)).sum()
    return total
