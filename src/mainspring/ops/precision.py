"""The dtype in which sums are kept: float32, or float64 for the gradient checks of the references."""

from __future__ import annotations

import torch


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 tensors, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32
