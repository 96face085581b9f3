"""Softmax of scaled and masked attention scores, as Megatron fuses it."""

from __future__ import annotations

from mainspring.tensor import _tensor as mt
from mainspring.tensor._tensor import Tensor

MASKED = -10000.0  # Megatron's score of a masked place: a row masked whole is uniform, not NaN


def scaled_masked_softmax(scores: Tensor, mask: Tensor | None, scale: float, causal: bool = False) -> Tensor:
    """softmax(scale scores) over the last dimension of [batch, heads, queries, keys], where the mask is true MASKED.

    `causal` masks the keys behind a query with -inf instead. Halves are computed in float32 and rounded once.
    """
    x = scores if scores.dtype is mt.float64 else scores.float()
    x = x * scale
    if causal:
        hidden = mt.triu(mt.ones(scores.shape[-2:], dtype=mt.bool), 1 + scores.shape[-1] - scores.shape[-2])
        x = mt.masked_fill(x, hidden, float("-inf"))
    if mask is not None:
        x = mt.masked_fill(x, mask, MASKED)
    return mt.softmax(x, -1).to(scores.dtype)
