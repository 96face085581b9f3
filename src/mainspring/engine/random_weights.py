"""Weights that nobody trained, for benchmarks: matrices normal(0, 0.02), norms one, biases zero."""

from __future__ import annotations

import torch
from torch import Tensor

_DEVIATION = 0.02


@torch.no_grad()
def draw(parameter: Tensor, name: str, generator: torch.Generator) -> None:
    """Fills a parameter, or a part of one, in place. generator: of the parameter's device."""
    if parameter.dim() == 1:
        parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    else:
        parameter.normal_(0.0, _DEVIATION, generator=generator)
