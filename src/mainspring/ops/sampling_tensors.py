"""What each seat of the engine samples by, as tensors: one row of 64 bytes a seat, so that all travel in one copy.

A seat is a place in a running batch. Rows of logits name their seats; nothing here has a shape that depends on which
seats are taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROW_WORDS = 8  # 64-bit words of a seat's row
GOLDEN = 0x9E3779B97F4A7C15  # the step of SplitMix64

# Constants of the draw, shared by every implementation of `ops.sample`.
LARGEST_UNIFORM = 1.0 - 2.0**-24
SMALL_UNIFORM = 2.0**-7  # below it three terms of the series of -log(1 - w) are exact to float32
SMALLEST_TEMPERATURE = 1e-30  # differences divided by less would overflow where they are 0
MASS_UNIT = 2.0**40  # the likeliest token's mass, as an integer

# Columns of a row: the key is its first word, the others are 32-bit halves.
_TEMPERATURE, _TOP_P, _MIN_P, _TOP_K, _REPETITION, _PRESENCE, _FREQUENCY, _BIASED = range(2, 10)


@dataclass(frozen=True)
class SamplingTensors:
    """Views of one int64 tensor [S, ROW_WORDS]; writing to a view writes to it.

    Attributes:
        rows: [S, ROW_WORDS] int64, the storage.
        key: [S] int64, the bits of a 64-bit key.
        temperature, top_p, min_p: [S] float32; 0, 1 and 0 are greedy, off and off.
        top_k: [S] int32, 0 is off.
        repetition, presence, frequency: [S] float32, the penalties; 1, 0 and 0 are off.
        biased: [S] int32, 1 where the seat's row of biases counts.
    """

    rows: Tensor
    key: Tensor
    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    top_k: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor
    biased: Tensor

    @staticmethod
    def over(rows: Tensor) -> SamplingTensors:
        """The views of a storage [S, ROW_WORDS] int64."""
        floats, ints = rows.view(torch.float32), rows.view(torch.int32)
        return SamplingTensors(
            rows=rows,
            key=rows[:, 0],
            temperature=floats[:, _TEMPERATURE],
            top_p=floats[:, _TOP_P],
            min_p=floats[:, _MIN_P],
            top_k=ints[:, _TOP_K],
            repetition=floats[:, _REPETITION],
            presence=floats[:, _PRESENCE],
            frequency=floats[:, _FREQUENCY],
            biased=ints[:, _BIASED],
        )

    @staticmethod
    def allocate(seats: int, device: torch.device | str = "cpu") -> SamplingTensors:
        """Greedy seats with everything off."""
        tensors = SamplingTensors.over(torch.zeros(seats, ROW_WORDS, dtype=torch.int64, device=device))
        tensors.top_p.fill_(1.0)
        tensors.repetition.fill_(1.0)
        return tensors
