"""From a loss per token to a step's loss.

The denominators count the whole step (all micro-batches, all ranks): micro-batches' results then add up to the
same loss, and to the same gradient, however the step was cut.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mainspring.errors import ConfigError
from mainspring.rl.math.segments import sequence_sums


def mean_over_tokens(losses: Tensor, written: Tensor, *, num_tokens: int) -> Tensor:
    """Σ of written tokens / the step's written tokens, a scalar: long answers weigh more.

    losses: [T]; written: [T] bool. DAPO's token-level loss (Yu et al., arXiv 2503.14476, section 3.3).
    Raises ConfigError if num_tokens is not positive.
    """
    _check("num_tokens", num_tokens)
    return torch.where(written, losses, 0).sum() / num_tokens


def mean_over_sequences(losses: Tensor, written: Tensor, lengths: Tensor, *, num_sequences: int) -> Tensor:
    """Σ of each sequence's mean over its written tokens / the step's sequences, a scalar: all answers weigh the same.

    GRPO's 1/G Σ 1/|o_i| Σ_t (Shao et al., arXiv 2402.03300, eq. 3). A sequence without written tokens adds 0.
    Raises ConfigError if num_sequences is not positive.
    """
    _check("num_sequences", num_sequences)
    counts = sequence_sums(written.to(losses.dtype), lengths)
    sums = sequence_sums(torch.where(written, losses, 0), lengths)
    return (sums / counts.clamp(min=1)).sum() / num_sequences


def constant_normalised(losses: Tensor, written: Tensor, *, num_sequences: int, max_tokens: int) -> Tensor:
    """Σ of written tokens / (the step's sequences · a fixed length), a scalar: no answer's length biases it.

    Dr. GRPO (Liu et al., arXiv 2503.20783, section 3.2), where the fixed length is the generation budget. (verl's
    seq-mean-token-sum-norm does not divide by the sequences.) Raises ConfigError if a denominator is not positive.
    """
    _check("num_sequences", num_sequences)
    _check("max_tokens", max_tokens)
    return torch.where(written, losses, 0).sum() / (num_sequences * max_tokens)


def _check(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name} must be at least 1, got {value}; it counts the whole step")
