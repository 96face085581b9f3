"""A penalty on answers that come near their budget of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from mainspring.errors import ConfigError


@torch.no_grad()
def overlong_penalty(lengths: Tensor, *, max_tokens: int, buffer: int) -> Tensor:
    """0 up to max_tokens − buffer written tokens, from there falling evenly to −1 at max_tokens -> [N] float32.

    lengths: [N], written tokens of each answer. DAPO's soft overlong punishment (Yu et al., arXiv 2503.14476, eq. 13).
    Raises ConfigError.
    """
    if not 0 < buffer <= max_tokens:
        raise ConfigError(f"the buffer must be within (0, max_tokens = {max_tokens}], got {buffer}")
    over = lengths.to(torch.float32) - (max_tokens - buffer)
    return -(over / buffer).clamp(0, 1)
