"""Sampling and the adjustments before it as PyTorch operators: neither has a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mainspring.ops.library.support import policy_of
from mainspring.ops.policy import Policy


def sample(
    logits: Tensor, rows: Tensor, seats: Tensor, positions: Tensor, truncate: bool, policy: Policy
) -> Tensor:
    """ops.sample.sample as an operator; rows are those of its `SamplingTensors`."""
    result: Tensor = sample_op(logits, rows, seats, positions, truncate, policy.numerics, policy.backend)
    return result


@torch.library.custom_op("mainspring::sample", mutates_args=())
def sample_op(
    logits: Tensor,
    rows: Tensor,
    seats: Tensor,
    positions: Tensor,
    truncate: bool,
    numerics: str,
    backend: str | None,
) -> Tensor:
    """logits: [N, V] -> [N] int64."""
    from mainspring.ops.sample import SAMPLE
    from mainspring.ops.sampling_tensors import SamplingTensors

    run = SAMPLE.select(logits, policy_of(numerics, backend))
    return run(logits, SamplingTensors.over(rows), seats, positions, truncate)


@sample_op.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty((logits.shape[0],), dtype=torch.int64)


def adjust_logits(
    logits: Tensor,
    rows: Tensor,
    seats: Tensor,
    history: Tensor | None,
    bias: Tensor | None,
    bitmask: Tensor | None,
    policy: Policy,
) -> Tensor:
    """ops.adjust_logits.adjust_logits as an operator; rows are those of its `SamplingTensors`."""
    result: Tensor = adjust_logits_op(
        logits, rows, seats, history, bias, bitmask, policy.numerics, policy.backend
    )
    return result


@torch.library.custom_op("mainspring::adjust_logits", mutates_args=())
def adjust_logits_op(
    logits: Tensor,
    rows: Tensor,
    seats: Tensor,
    history: Tensor | None,
    bias: Tensor | None,
    bitmask: Tensor | None,
    numerics: str,
    backend: str | None,
) -> Tensor:
    """logits: [N, V] -> [N, V], a new tensor."""
    from mainspring.ops.adjust_logits import ADJUST_LOGITS
    from mainspring.ops.sampling_tensors import SamplingTensors

    run = ADJUST_LOGITS.select(logits, policy_of(numerics, backend))
    return run(logits, SamplingTensors.over(rows), seats, history, bias, bitmask)


@adjust_logits_op.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)
