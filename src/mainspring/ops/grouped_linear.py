"""One linear layer per expert over rows that are sorted by expert."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mainspring.ops.linear import linear
from mainspring.ops.policy import LOCKSTEP, Policy


def grouped_linear(x: Tensor, weight: Tensor, counts: Sequence[int], *, policy: Policy = LOCKSTEP) -> Tensor:
    """Expert e's weight on its counts[e] consecutive rows. x: [R, K], weight: [E, N, K] -> [R, N].

    A row's bits are those of `linear` with its expert's weight, whatever rows stand beside it.
    """
    pieces = [
        linear(rows, weight[expert], policy=policy)
        for expert, rows in enumerate(x.split(list(counts)))
        if rows.shape[0]
    ]
    return torch.cat(pieces) if pieces else x.new_empty((0, weight.shape[1]))
