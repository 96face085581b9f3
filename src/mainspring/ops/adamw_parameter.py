"""A parameter of AdamW and its state, as every backend is given them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AdamWParameter:
    """A weight and its state, of one shape and contiguous.

    master: float32, updated in place; None if the weight is the parameter itself. exp_avg, exp_avg_sq: running means
    of the gradient and of its square, both float32, or both uint8 codes with their scales (zeros to begin with).
    weight: a rounded copy of the master in a narrower dtype that is refreshed with it, or the parameter, or None.
    exp_avg_scale, exp_avg_sq_scale: float32, one for each 256 elements of a uint8 state.
    Only the Triton kernel takes parameters without masters and states in 8 bits.
    """

    master: Tensor | None
    exp_avg: Tensor
    exp_avg_sq: Tensor
    weight_decay: float
    weight: Tensor | None = None
    exp_avg_scale: Tensor | None = None
    exp_avg_sq_scale: Tensor | None = None
