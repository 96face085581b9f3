"""Sums over the sequences of a packed stream, and their way back to the tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from mainspring.errors import ConfigError


def check_lengths(lengths: Tensor, num_tokens: int) -> None:
    """Raises ConfigError unless the lengths [S] are not negative and sum to the number of tokens."""
    if lengths.numel() and int(lengths.min()) < 0:
        raise ConfigError(f"sequence lengths must not be negative, got {lengths.tolist()}")
    if int(lengths.sum()) != num_tokens:
        raise ConfigError(
            f"the sequence lengths sum to {int(lengths.sum())}, but there are {num_tokens} tokens; "
            "give one length for each sequence of the packed stream"
        )


def sequence_sums(values: Tensor, lengths: Tensor) -> Tensor:
    """values: [T] -> [S], the sum over each sequence (0 for an empty one). Differentiable.

    Raises ConfigError where the lengths do not fit.
    """
    check_lengths(lengths, values.shape[0])
    pieces = values.split(lengths.tolist())
    return torch.stack([piece.sum() for piece in pieces]) if pieces else values.new_zeros(0)


def spread(per_sequence: Tensor, lengths: Tensor) -> Tensor:
    """per_sequence: [S] -> [T]: each token gets its sequence's value. Differentiable."""
    return per_sequence.repeat_interleave(lengths)


def to_rows(values: Tensor, lengths: Tensor, fill: float | bool = 0) -> Tensor:
    """values: [T] -> [S, longest], filled up at the right: for scans along the sequences, all at once."""
    check_lengths(lengths, values.shape[0])
    rows: Tensor = torch.nn.utils.rnn.pad_sequence(
        list(values.split(lengths.tolist())), batch_first=True, padding_value=float(fill)
    )
    return rows


def from_rows(rows: Tensor, lengths: Tensor) -> Tensor:
    """[S, longest] -> [T]: the inverse of `to_rows`."""
    places = torch.arange(rows.shape[1], device=rows.device)
    return rows[places < lengths[:, None]]
