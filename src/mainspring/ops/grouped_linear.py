"""One linear layer per expert over rows that are sorted by expert."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from mainspring.errors import BackendError
from mainspring.ops import library
from mainspring.ops.checks import check_boundaries, described
from mainspring.ops.cpu.grouped_linear import grouped_linear as cpu_grouped_linear
from mainspring.ops.cpu.support import refuses
from mainspring.ops.cuda.support import refuses as cuda_refuses
from mainspring.ops.linear import linear
from mainspring.ops.policy import LOCKSTEP, Policy
from mainspring.ops.registry import Implementation, Operation, accepts_floats, any_requires_grad
from mainspring.ops.routing import Routing, combine_reference
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
    if (
        x.dim() != 2
        or weight.dim() != 3
        or weight.shape[2] != x.shape[1]
        or weight.dtype is not x.dtype
        or weight.device != x.device
    ):
        raise BackendError(
            f"grouped_linear: weight {described(weight)} does not fit x {described(x)}: they must be [E, N, K] and "
            "[R, K]"
        )
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
        offsets = counts
    else:
        if len(counts) != weight.shape[0] or sum(counts) != rows or min(counts, default=0) < 0:
            raise BackendError(
                f"grouped_linear: counts must be {weight.shape[0]} numbers of {rows} rows in all, not {counts}"
            )
        offsets = torch.tensor(list(accumulate(counts, initial=0)), dtype=torch.int32, device=x.device)
    check_boundaries("grouped_linear", "offsets", offsets, rows)
    index, places = (None, None) if gather is None else (gather.tokens, gather.places)
    if library.is_traced():
        return library.grouped_linear(x, weight, offsets, index, places, policy)
    needs_grad = any_requires_grad(x, weight)
    run = GROUPED_LINEAR.select(x, policy, needs_grad)
    if not needs_grad:
        return run(x, weight, offsets, index, policy)
    out: Tensor = _Grouped.apply(run, x, weight, offsets, index, places, policy)
    return out


def reference(x: Tensor, weight: Tensor, offsets: Tensor, index: Tensor | None, policy: Policy) -> Tensor:
    """`linear` for each expert's rows; offsets: [E + 1], index: [R], the row of x that each row is, or None."""
    pieces = [
        linear(rows, weight[expert], policy=policy)
        for expert, rows in enumerate(_experts_rows(x, offsets, index))
        if rows.shape[0]
    ]
    return torch.cat(pieces) if pieces else x.new_empty((0, weight.shape[1]))


def backward_reference(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    index: Tensor | None,
    places: Tensor | None,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(gradient of x, gradient of weight), those that are needed; a gathered row's pieces are added in fp32."""
    grads = _experts_rows(grad, offsets, None)
    grad_x = grad_weight = None
    if needs_x:
        grad_x = torch.cat([g @ weight[expert] for expert, g in enumerate(grads)])
        grad_x = grad_x if places is None else combine_reference(grad_x, None, places)
    if needs_weight:
        rows = _experts_rows(x, offsets, index)
        grad_weight = torch.stack([g.t() @ r for g, r in zip(grads, rows, strict=True)])
    return grad_x, grad_weight


def _experts_rows(x: Tensor, offsets: Tensor, index: Tensor | None) -> tuple[Tensor, ...]:
    """Each expert's rows. Reads the offsets on the host."""
    rows: tuple[Tensor, ...] = (x if index is None else x[index]).split(offsets.diff().tolist())
    return rows


class _Grouped(torch.autograd.Function):
    """Forward and both gradients, by kernels in one launch each; adding gathered rows' gradients takes one more."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[[Tensor, Tensor, Tensor, Tensor | None, Policy], Tensor],
        x: Tensor,
        weight: Tensor,
        offsets: Tensor,
        index: Tensor | None,
        places: Tensor | None,
        policy: Policy,
    ) -> Tensor:
        ctx.policy = policy
        ctx.save_for_backward(x, weight, offsets, index, places)
        return run(x, weight, offsets, index, policy)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, offsets, index, places = ctx.saved_tensors
        run = GROUPED_LINEAR_BACKWARD.select(x, ctx.policy)
        needs = ctx.needs_input_grad
        gradients = run(grad.contiguous(), x, weight, offsets, index, places, needs[1], needs[2])
        return None, *gradients, None, None, None, None


def _backward_by(
    kernels: Any,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    index: Tensor | None,
    places: Tensor | None,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    from mainspring.ops.triton.routing import combine

    grad_x = grad_weight = None
    if needs_x:
        grad_x = kernels.grouped_linear(grad, weight, offsets, transposed=True)
        grad_x = grad_x if places is None else combine(grad_x, None, places)
    if needs_weight:
        grad_weight = kernels.grouped_weight_gradient(x, grad, offsets, index)
    return grad_x, grad_weight


def _cpu(x: Tensor, weight: Tensor, offsets: Tensor, index: Tensor | None, policy: Policy) -> Tensor:
    return cpu_grouped_linear(x if index is None else x[index], weight, offsets)


def _cuda(x: Tensor, weight: Tensor, offsets: Tensor, index: Tensor | None, policy: Policy) -> Tensor:
    from mainspring.ops.cuda import grouped_linear as kernels

    return kernels.grouped_linear(x, weight, offsets, index)


def _cuda_backward(
    grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, index: Tensor | None, places: Tensor | None,
    needs_x: bool, needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    from mainspring.ops.cuda import grouped_linear as kernels

    return _backward_by(kernels, grad, x, weight, offsets, index, places, needs_x, needs_weight)


def _triton(x: Tensor, weight: Tensor, offsets: Tensor, index: Tensor | None, policy: Policy) -> Tensor:
    from mainspring.ops.triton import grouped_linear as kernels

    return kernels.grouped_linear(x, weight, offsets, index)


def _triton_backward(
    grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor, index: Tensor | None, places: Tensor | None,
    needs_x: bool, needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    from mainspring.ops.triton import grouped_linear as kernels

    return _backward_by(kernels, grad, x, weight, offsets, index, places, needs_x, needs_weight)


GROUPED_LINEAR = Operation(
    "grouped_linear",
    Implementation("cpu", _cpu, refuses),
    Implementation("cuda", _cuda, cuda_refuses),  # what it does not serve it hands to Triton's
    # Also where numerics are fast: the reference's loop waits for the host, and cuBLAS for its small products.
    Implementation("triton", _triton, triton_refuses),
    Implementation("reference", reference, accepts_floats),
)
GROUPED_LINEAR_BACKWARD = Operation(
    "grouped_linear_backward",
    Implementation("cpu", backward_reference, refuses),
    Implementation("cuda", _cuda_backward, cuda_refuses),
    Implementation("triton", _triton_backward, triton_refuses),
    Implementation("reference", backward_reference, accepts_floats),
)
