"""One linear layer per expert over rows that are sorted by expert."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from mainspring.errors import BackendError
from mainspring.ops.cpu.grouped_linear import grouped_linear as cpu_grouped_linear
from mainspring.ops.cpu.support import refuses
from mainspring.ops.cuda.support import refuses as cuda_refuses
from mainspring.ops.linear import linear
from mainspring.ops.policy import LOCKSTEP, Policy
from mainspring.ops.registry import Implementation, Operation, accepts_all, any_requires_grad
from mainspring.ops.routing import Routing
from mainspring.ops.triton.support import refuses as triton_refuses

Counts = Sequence[int] | Tensor


def grouped_linear(
    x: Tensor, weight: Tensor, counts: Counts, *, gather: Routing | None = None, policy: Policy = LOCKSTEP
) -> Tensor:
    """Expert e's weight on its rows. x: [R, K], sorted by expert, weight: [E, N, K] -> [R, N].

    counts: rows of each expert, or `Routing.offsets` ([E + 1] int32 on x's device, from 0 to R), with which no kernel
    waits for the host. With `gather`, x is [T, K] and its rows are taken as the routing sorts them.
    A row's bits are those of `linear` with its expert's weight, whatever rows stand beside it.

    Raises:
        BackendError: counts, weight or gather do not fit x.
    """
    rows = x.shape[0] if gather is None else gather.order.shape[0]
    if gather is not None and gather.experts.shape[0] != x.shape[0]:
        raise BackendError(
            f"grouped_linear: gather routes {gather.experts.shape[0]} tokens, x has {x.shape[0]}"
        )
    if isinstance(counts, Tensor):
        fits = counts.dtype is torch.int32 and counts.shape == (weight.shape[0] + 1,)
        if not fits or counts.device != x.device:
            raise BackendError(
                f"grouped_linear: offsets must be [{weight.shape[0] + 1}] int32 on {x.device}, not "
                f"{tuple(counts.shape)} of {counts.dtype} on {counts.device}"
            )
    elif len(counts) != weight.shape[0] or sum(counts) != rows or min(counts, default=0) < 0:
        raise BackendError(
            f"grouped_linear: counts must be {weight.shape[0]} numbers of {rows} rows in all, not {counts}"
        )
    run = GROUPED_LINEAR.select(x, policy, any_requires_grad(x, weight))
    return run(x, weight, counts, gather, policy)


def reference(x: Tensor, weight: Tensor, counts: Counts, gather: Routing | None, policy: Policy) -> Tensor:
    if gather is not None:
        x = x[gather.tokens]
    sizes = counts.diff().tolist() if isinstance(counts, Tensor) else list(counts)
    pieces = [
        linear(rows, weight[expert], policy=policy)
        for expert, rows in enumerate(x.split(sizes))
        if rows.shape[0]
    ]
    return torch.cat(pieces) if pieces else x.new_empty((0, weight.shape[1]))


def offsets_of(counts: Counts, device: torch.device) -> Tensor:
    """[E + 1] int32, the first row of each expert."""
    if isinstance(counts, Tensor):
        return counts
    return torch.tensor(list(accumulate(counts, initial=0)), dtype=torch.int32, device=device)


class _Grouped(torch.autograd.Function):
    """Forward and both gradients in one launch each (the gradient of gathered rows takes one more, to add them)."""

    @staticmethod
    def forward(
        ctx: Any,
        kernels: Any,
        x: Tensor,
        weight: Tensor,
        offsets: Tensor,
        index: Tensor | None,
        places: Tensor | None,
    ) -> Tensor:
        ctx.kernels = kernels
        ctx.save_for_backward(x, weight, offsets, index, places)
        out: Tensor = kernels.grouped_linear(x, weight, offsets, index)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from mainspring.ops.triton.routing import combine

        x, weight, offsets, index, places = ctx.saved_tensors
        grad, grad_x, grad_weight = grad.contiguous(), None, None
        if ctx.needs_input_grad[1]:
            grad_x = ctx.kernels.grouped_linear(grad, weight, offsets, transposed=True)
            grad_x = grad_x if places is None else combine(grad_x, None, places)
        if ctx.needs_input_grad[2]:
            grad_weight = ctx.kernels.grouped_weight_gradient(x, grad, offsets, index)
        return None, grad_x, grad_weight, None, None, None


def _cpu(x: Tensor, weight: Tensor, counts: Counts, gather: Routing | None, policy: Policy) -> Tensor:
    if any_requires_grad(x, weight):  # the same bits, expert by expert, with linear's gradient
        return reference(x, weight, counts, gather, policy)
    rows = x if gather is None else x[gather.tokens]
    return cpu_grouped_linear(rows, weight, offsets_of(counts, x.device))


def _by(kernels: Any, x: Tensor, weight: Tensor, counts: Counts, gather: Routing | None) -> Tensor:
    index, places = (None, None) if gather is None else (gather.tokens, gather.places)
    out: Tensor = _Grouped.apply(kernels, x, weight, offsets_of(counts, x.device), index, places)
    return out


def _cuda(x: Tensor, weight: Tensor, counts: Counts, gather: Routing | None, policy: Policy) -> Tensor:
    from mainspring.ops.cuda import grouped_linear as kernels

    return _by(kernels, x, weight, counts, gather)


def _triton(x: Tensor, weight: Tensor, counts: Counts, gather: Routing | None, policy: Policy) -> Tensor:
    from mainspring.ops.triton import grouped_linear as kernels

    return _by(kernels, x, weight, counts, gather)


GROUPED_LINEAR = Operation(
    "grouped_linear",
    Implementation("cpu", _cpu, refuses),
    Implementation("cuda", _cuda, cuda_refuses),  # what it does not serve it hands to Triton's
    # Also where numerics are fast: the reference's loop waits for the host, and cuBLAS for its small products.
    Implementation("triton", _triton, triton_refuses),
    Implementation("reference", reference, accepts_all),
)
