"""Which tokens make a training sample, and which data set the next sample comes from: Megatron's index helpers."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from mainspring.tensor._tensor import ValueOutOfRangeError

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]


def build_sample_idx(
    sizes: npt.ArrayLike,
    document_idx: npt.ArrayLike,
    seq_length: int,
    num_epochs: int,
    tokens_per_epoch: int,
    drop_last_partial_sequence: bool = True,
    add_extra_token_to_sequence: bool = True,
) -> Int64s:
    """[samples + 1, 2]: for each sample its first entry of `document_idx` and the offset within that document.

    `sizes` are the documents' lengths, `document_idx` their order over all epochs. Samples overlap by the extra token.
    All in integers: the number of samples is the floor (or ceiling) of (epochs * tokens - extra) / seq_length.

    Raises:
        ValueOutOfRangeError: lengths that are not positive, or fewer tokens in the documents than announced.
    """
    extra = int(add_extra_token_to_sequence)
    if seq_length < 1 or num_epochs < 1 or tokens_per_epoch < 1:
        raise ValueOutOfRangeError(
            f"seq_length {seq_length}, num_epochs {num_epochs} and tokens_per_epoch {tokens_per_epoch} must be positive"
        )
    total = num_epochs * tokens_per_epoch - extra
    count = total // seq_length if drop_last_partial_sequence else -(-total // seq_length)
    lengths = np.asarray(sizes, dtype=np.int64)[np.asarray(document_idx, dtype=np.int64)]
    ends = np.cumsum(lengths)
    starts = np.arange(count + 1, dtype=np.int64) * seq_length
    if not drop_last_partial_sequence:
        starts[-1] = min(starts[-1], total)
    if count and (len(ends) == 0 or starts[-1] + extra > ends[-1]):
        raise ValueOutOfRangeError(
            f"{starts[-1] + extra} tokens are needed, the documents hold {ends[-1] if len(ends) else 0}"
        )
    # A start at a document's very end belongs to the next one, unless it is the shared extra token's place.
    place = np.searchsorted(ends, starts, side="right" if extra else "left")
    place = np.minimum(place, max(0, len(ends) - 1))
    offsets = starts - (ends[place] - lengths[place])
    return np.stack([place, offsets], axis=1)


def build_blending_indices(weights: Sequence[float], size: int) -> tuple[Int32s, Int64s]:
    """(data set of each sample, its number within that data set): each time the one that is furthest behind its share.

    Shares are compared as exact fractions of the weights (Megatron: in float64, where equal weights can part).

    Raises:
        ValueOutOfRangeError: no weights, or one that is negative, or all zero.
    """
    exact = [Fraction(w) for w in weights]
    if not exact or min(exact) < 0 or sum(exact) == 0:
        raise ValueOutOfRangeError(f"weights {list(weights)} cannot be shared out")
    denominator = int(np.lcm.reduce([f.denominator for f in exact], dtype=object))
    parts = [int(f * denominator) for f in exact]
    total = sum(parts)
    taken = [0] * len(parts)
    dataset, sample = np.zeros(size, dtype=np.int32), np.zeros(size, dtype=np.int64)
    for i in range(size):
        # max(i, 1) weight - taken, times the total of all weights
        best = max(range(len(parts)), key=lambda d: max(i, 1) * parts[d] - taken[d] * total)
        dataset[i], sample[i] = best, taken[best]
        taken[best] += 1
    return dataset, sample
