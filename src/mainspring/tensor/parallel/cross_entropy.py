"""Cross-entropy over a vocabulary that is split over the ranks: no rank ever holds a whole row of logits."""

from __future__ import annotations

from mainspring.tensor import _tensor as mt
from mainspring.tensor._tensor import Group, ShapeError, Tensor, ValueOutOfRangeError


def vocab_parallel_cross_entropy(
    logits: Tensor, target: Tensor, group: Group, label_smoothing: float = 0.0
) -> Tensor:
    """Losses [...] of logits [..., vocabulary / ranks] and targets [...], by exactly three all-reduces of [...].

    The third one carries the sum of the exponentials and, for label smoothing, the sum of all ranks' logits beside it:
    the mean log-probability is then that of the whole vocabulary. With K classes and smoothing s, as in Megatron,
    loss = (1 - s') nll - s' mean(log p), where s' = s K / (K - 1).

    Raises:
        ShapeError: targets that do not fit the logits.
        ValueOutOfRangeError: a smoothing outside [0, 1).
    """
    if tuple(target.shape) != tuple(logits.shape[:-1]):
        raise ShapeError(
            f"targets of shape {tuple(target.shape)} do not fit logits of shape {tuple(logits.shape)}"
        )
    if not 0 <= label_smoothing < 1:
        raise ValueOutOfRangeError(f"label_smoothing is {label_smoothing}; it must lie in [0, 1)")
    part = logits.shape[-1]
    classes, start = part * group.size, group.rank * part
    x = logits.detach()
    x = x if x.dtype is mt.float64 else x.float()

    most = mt.amax(x, -1)
    group.all_reduce(most, "max")
    x = x - most.unsqueeze(-1)

    elsewhere = mt.logical_or(target < start, target >= start + part)
    local = mt.where(elsewhere, mt.tensor(0), target - start).unsqueeze(-1)
    predicted = mt.masked_fill(mt.gather(x, -1, local).squeeze(-1), elsewhere, 0.0).contiguous()
    group.all_reduce(predicted)

    exponentials = mt.exp(x)
    sums = mt.stack(
        [mt.sum(exponentials, -1), mt.sum(x, -1)] if label_smoothing else [mt.sum(exponentials, -1)]
    )
    group.all_reduce(sums)
    log_sum = mt.log(sums[0])
    probabilities = exponentials / sums[0].unsqueeze(-1)

    smoothing = label_smoothing * classes / (classes - 1) if label_smoothing else 0.0
    losses = log_sum - predicted
    if smoothing:
        mean_log_probability = sums[1] / classes - log_sum
        losses = losses * (1 - smoothing) - mean_log_probability * smoothing

    def backward(grad: Tensor) -> list[Tensor | None]:
        # p - (1 - s') onehot - s' / K
        hit = mt.full(target.shape, 1 - smoothing, dtype=probabilities.dtype)
        hit = mt.masked_fill(hit, elsewhere, 0.0).unsqueeze(-1)
        out = mt.scatter_add(probabilities, -1, local, -hit) - smoothing / classes
        return [out * grad.unsqueeze(-1)]

    return mt.record(losses, [logits], backward)
