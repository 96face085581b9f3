"""Rounding to bfloat16 up or down with the probability that makes it right on average: the reference of AdamW's kernel.

The 16 bits that fall away are added to 16 random ones, from Philox4x32-7 (Salmon et al., "Parallel Random Numbers: As
Easy as 1, 2, 3", 2011), so that the same seed, parameter and step give the same weights on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 7
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85  # what a round adds to the key
_WORD = 0xFFFFFFFF
_AT_ONCE = 1 << 20  # elements: noise is of 64-bit integers


def _product(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and the lower 32 bits of factor · x, both below 2^32, x int64."""
    low = factor * (x & 0xFFFF)
    high = factor * (x >> 16) + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF


def philox(counter: Tensor, second: int, third: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words for each counter (int64, below 2^32), as int64 of 0 to 2^32 - 1."""
    words = [counter, torch.full_like(counter, second & _WORD), torch.full_like(counter, third & _WORD)]
    a, b, c, d = *words, torch.zeros_like(counter)
    keys = seed & _WORD, seed >> 32 & _WORD
    for _ in range(_ROUNDS):
        high_a, low_a = _product(_MULTIPLIERS[0], a)
        high_c, low_c = _product(_MULTIPLIERS[1], c)
        a, b, c, d = high_c ^ b ^ keys[0], low_c, high_a ^ d ^ keys[1], low_a
        keys = (keys[0] + _WEYL[0]) & _WORD, (keys[1] + _WEYL[1]) & _WORD
    return a, b, c, d


def round_stochastically(x: Tensor, *, parameter: int, step: int, seed: int) -> Tensor:
    """float32 x, contiguous, as bfloat16 of its shape. What is not finite stays so.

    parameter: its number among the optimizer's; step: counted from 1.
    """
    flat = x.flatten()
    rounded = torch.empty(len(flat), dtype=torch.bfloat16, device=x.device)
    for first in range(0, len(flat), _AT_ONCE):
        part = flat[first : first + _AT_ONCE]
        counter = first // 4 + torch.arange((len(part) + 3) // 4, device=x.device)
        a, b, c, d = philox(counter, parameter, step, seed)
        noise = torch.stack((a, c, b, d), 1).flatten()[: len(part)] & 0xFFFF
        bits = part.view(torch.int32).to(torch.int64) & _WORD
        finite = bits & 0x7F800000 != 0x7F800000
        top = torch.where(finite, bits + noise, bits) >> 16
        words = torch.where(top >= 0x8000, top - 0x10000, top).to(torch.int16)
        # A NaN whose upper half alone would be an infinity stays a NaN.
        rounded[first : first + len(part)] = torch.where(
            part.isnan(), part.to(torch.bfloat16), words.view(torch.bfloat16)
        )
    return rounded.view(x.shape)
