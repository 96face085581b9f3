"""Which tokens make a training sample, and which data set the next sample comes from: Megatron's index helpers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mainspring.tensor import _tensor as mt

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
        IndexOutOfRangeError: an entry of `document_idx` that is no document.
    """
    lengths, order = (np.ascontiguousarray(x, dtype=np.int64).reshape(-1) for x in (sizes, document_idx))
    out = mt._build_sample_idx(
        mt.from_numpy(lengths.copy()),
        mt.from_numpy(order.copy()),
        seq_length,
        num_epochs,
        tokens_per_epoch,
        drop_last_partial_sequence,
        add_extra_token_to_sequence,
    )
    return out.numpy()


def build_blending_indices(weights: Sequence[float], size: int) -> tuple[Int32s, Int64s]:
    """(data set of each sample, its number within that data set): each time the one that is furthest behind its share.

    Shares are compared as exact integers (Megatron: in float64, where equal weights can part).

    Raises:
        ValueOutOfRangeError: no weights, one that is negative or not finite, all zero, or weights so far apart (about
            2^40 for a million samples) that their shares do not fit 127 bits.
    """
    dataset, sample = mt._build_blending_indices([float(w) for w in weights], size)
    return dataset.numpy(), sample.numpy()
