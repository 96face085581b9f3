"""Seats with random sampling parameters, for the tests of the sampler's operations."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from mainspring.ops.sampling_tensors import SamplingTensors

TEMPERATURES = (0.0, 1e-40, 0.3, 0.7, 1.0, 1.5)


def random_seats(seed: int, seats: int, vocab: int, truncate: bool = True) -> SamplingTensors:
    """Any mix of greedy, drawn and truncated seats, on the CPU."""
    pick = random.Random(seed)
    params = SamplingTensors.allocate(seats)
    for seat in range(seats):
        params.key[seat] = pick.getrandbits(64) - (1 << 63)
        params.temperature[seat] = pick.choice(TEMPERATURES)
        if truncate:
            params.top_k[seat] = pick.choice([0, 0, 1, 2, 5, 40, 500, 2 * vocab])
            params.top_p[seat] = pick.choice([1.0, 1.0, 1e-9, 0.3, 0.9, 0.999])
            params.min_p[seat] = pick.choice([0.0, 0.0, 0.01, 0.3, 1.0])
    return params


def random_logits(seed: int, rows: int, vocab: int) -> Tensor:
    """[rows, vocab] float32 of some scale; now and then with many equal ones, and with forbidden ones."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator) * (0.1, 3.0, 30.0)[seed % 3]
    if seed % 2:
        logits = (logits * 4).round() / 4
    if seed % 5 == 0:
        logits[:, :: 1 + seed % 7] = -torch.inf
    return logits


def to_device(params: SamplingTensors, device: str) -> SamplingTensors:
    """A copy on a device."""
    return SamplingTensors.over(params.rows.to(device))
