"""Softmax of scaled and masked attention scores, as Megatron fuses it (csrc/parallel/softmax.h)."""

from __future__ import annotations

from mainspring.tensor import _tensor as mt
from mainspring.tensor._tensor import Tensor


def scaled_masked_softmax(scores: Tensor, mask: Tensor | None, scale: float, causal: bool = False) -> Tensor:
    """softmax(scale scores) over the last dimension of [batch, heads, queries, keys], where the mask is true -10000.

    That score makes a row that is masked whole uniform, not NaN. `causal` masks the keys behind a query with -inf
    instead. Halves are computed in float32 and rounded once.

    Raises:
        ShapeError: scores without two dimensions, or a mask that does not broadcast to them.
        DTypeError: a mask that is not bool.
    """
    return mt._scaled_masked_softmax(scores, mask, scale, causal)
