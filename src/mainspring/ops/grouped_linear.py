"""One linear layer per expert over rows that are sorted by expert."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from mainspring.ops.cpu.grouped_linear import grouped_linear as cpu_grouped_linear
from mainspring.ops.cpu.support import refuses
from mainspring.ops.linear import linear
from mainspring.ops.policy import LOCKSTEP, Policy
from mainspring.ops.registry import Implementation, Operation, accepts_all, any_requires_grad
from mainspring.ops.triton.support import refuses_fast_numerics as triton_refuses


def grouped_linear(x: Tensor, weight: Tensor, counts: Sequence[int], *, policy: Policy = LOCKSTEP) -> Tensor:
    """Expert e's weight on its counts[e] consecutive rows. x: [R, K], weight: [E, N, K] -> [R, N].

    A row's bits are those of `linear` with its expert's weight, whatever rows stand beside it.
    """
    run = GROUPED_LINEAR.select(x, policy, any_requires_grad(x, weight))
    return run(x, weight, counts, policy)


def reference(x: Tensor, weight: Tensor, counts: Sequence[int], policy: Policy) -> Tensor:
    pieces = [
        linear(rows, weight[expert], policy=policy)
        for expert, rows in enumerate(x.split(list(counts)))
        if rows.shape[0]
    ]
    return torch.cat(pieces) if pieces else x.new_empty((0, weight.shape[1]))


def _cpu(x: Tensor, weight: Tensor, counts: Sequence[int], policy: Policy) -> Tensor:
    if any_requires_grad(x, weight):
        return reference(x, weight, counts, policy)  # the same bits, expert by expert, with linear's gradient
    offsets = torch.tensor(list(accumulate(counts, initial=0)), dtype=torch.int32)
    return cpu_grouped_linear(x, weight, offsets)


GROUPED_LINEAR = Operation(
    "grouped_linear",
    Implementation("cpu", _cpu, refuses),
    # A call of Triton's linear for each expert: the loop of the reference chooses it by itself.
    Implementation("triton", reference, triton_refuses),
    Implementation("reference", reference, accepts_all),
)
