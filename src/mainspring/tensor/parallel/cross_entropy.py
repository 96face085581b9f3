"""Cross-entropy over a vocabulary that is split over the ranks (csrc/parallel/cross_entropy.h)."""

from __future__ import annotations

from mainspring.tensor import _tensor as mt
from mainspring.tensor._tensor import Group, Tensor


def vocab_parallel_cross_entropy(
    logits: Tensor, target: Tensor, group: Group, label_smoothing: float = 0.0
) -> Tensor:
    """Losses [...] of logits [..., vocabulary / ranks] and targets [...], by exactly three all-reduces of [...].

    The third one carries the sum of the exponentials and, for label smoothing, the sum of all ranks' logits beside it:
    the mean log-probability is then that of the whole vocabulary. With K classes and smoothing s, as in Megatron,
    loss = (1 - s') nll - s' mean(log p), where s' = s K / (K - 1).

    Raises:
        ShapeError: targets that do not fit the logits.
        IndexOutOfRangeError: a target that is no class of the whole vocabulary.
        ValueOutOfRangeError: a smoothing outside [0, 1).
        AutogradError: a gradient of higher order.
    """
    return mt._vocab_parallel_cross_entropy(logits, target, group, label_smoothing)
