"""y = x Wᵀ + b with the same bits under tensor parallelism of degree 1, 2, 4 and 8.

K is cut into eight equal segments s0 .. s7, each summed on its own in fp32 and joined by a fixed binary tree,
((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7)). A rank of a row-parallel layer owns 8 / degree neighbouring segments,
which are a subtree: it computes that subtree's sum, and joining the ranks' sums goes on with the same tree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from mainspring.errors import BackendError
from mainspring.ops import library
from mainspring.ops.checks import check_product
from mainspring.ops.cuda.support import refuses as cuda_refuses
from mainspring.ops.linear import _KernelLinear, reference_rows
from mainspring.ops.policy import LOCKSTEP, Policy
from mainspring.ops.registry import Implementation, Operation, accepts_floats, any_requires_grad
from mainspring.ops.triton.support import refuses as triton_refuses

SEGMENTS = 8


def linear_tp_invariant(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    segments: int = SEGMENTS,
    out_dtype: torch.dtype | None = None,
    policy: Policy = LOCKSTEP,
) -> Tensor:
    """x: [M, K], weight: [N, K], bias: [N] -> [M, N] in out_dtype (x's by default); K a multiple of `segments`.

    The bits are those of `join_tp_partials` over the ranks of any degree that divides `segments`, and a row's do not
    depend on the other rows.

    Raises:
        BackendError: segments is not 1, 2, 4 or 8, or does not divide K; weight or bias do not fit x.
    """
    _check(x, weight, bias, segments)
    if library.is_traced():
        return library.linear_tp_invariant(x, weight, bias, out_dtype or x.dtype, segments, policy)
    run = LINEAR_TP_INVARIANT.select(x, policy, any_requires_grad(x, weight, bias))
    return run(x, weight, bias, out_dtype or x.dtype, segments)


def linear_tp_partial(
    x: Tensor, weight: Tensor, *, degree: int, segments: int = SEGMENTS, policy: Policy = LOCKSTEP
) -> Tensor:
    """A rank's part of `linear_tp_invariant`: the fp32 sum of its subtree.

    x: [M, K / degree], weight: [N, K / degree], the rank's neighbouring columns of both -> [M, N] float32.

    Raises:
        BackendError: degree does not divide segments, or the rank's columns have not segments / degree equal parts.
    """
    if degree < 1 or segments % degree:
        raise BackendError(f"linear_tp_partial: degree {degree} does not divide {segments} segments")
    own = segments // degree
    _check(x, weight, None, own)
    if library.is_traced():
        return library.linear_tp_invariant(x, weight, None, torch.float32, own, policy)
    run = LINEAR_TP_INVARIANT.select(x, policy, any_requires_grad(x, weight))
    return run(x, weight, None, torch.float32, own)


def join_tp_partials(
    partials: Sequence[Tensor], bias: Tensor | None = None, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """The ranks' subtree sums, in rank order, joined by the rest of the tree; then the bias, and one rounding.

    partials: [M, N] float32 each; a power of two of them.

    Raises:
        BackendError: their number is not a power of two, or they differ in shape.
    """
    level = list(partials)
    if not level or len(level) & (len(level) - 1):
        raise BackendError(
            f"join_tp_partials: the number of partial sums must be a power of two, not {len(level)}"
        )
    if any(p.shape != level[0].shape or p.dtype is not level[0].dtype for p in level):
        raise BackendError(
            f"join_tp_partials: sums differ in shape or dtype: {[f'{p.dtype} {tuple(p.shape)}' for p in level]}"
        )
    while len(level) > 1:
        level = [left + right for left, right in zip(level[::2], level[1::2], strict=True)]
    whole = level[0] if bias is None else level[0] + bias.to(level[0].dtype)
    return whole.to(out_dtype)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, segments: int) -> None:
    check_product("linear_tp_invariant", x, weight, bias)
    if segments not in (1, 2, 4, 8) or x.shape[1] % segments or not x.shape[1]:
        raise BackendError(
            f"linear_tp_invariant: K = {x.shape[1]} must be cut into 1, 2, 4 or 8 equal segments, not {segments}"
        )


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype, segments: int
) -> Tensor:
    precise = x.dtype if x.dtype == torch.float64 else torch.float32
    pairs = zip(x.chunk(segments, 1), weight.chunk(segments, 1), strict=True)
    partials = [reference_rows(a.to(precise), b.to(precise), None) for a, b in pairs]
    return join_tp_partials(partials, bias, out_dtype)


def _by(
    kernel: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    segments: int,
) -> Tensor:
    if any_requires_grad(x, weight, bias):
        result: Tensor = _KernelLinear.apply(partial(kernel, segments=segments), x, weight, bias, out_dtype)
        return result
    return kernel(x, weight, bias, out_dtype, segments)


def _cuda(x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype, segments: int) -> Tensor:
    from mainspring.ops.cuda.linear import segmented_linear

    return _by(segmented_linear, x, weight, bias, out_dtype, segments)


def _triton(x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype, segments: int) -> Tensor:
    from mainspring.ops.triton.linear_tp_invariant import segmented_linear

    return _by(segmented_linear, x, weight, bias, out_dtype, segments)


LINEAR_TP_INVARIANT = Operation(
    "linear_tp_invariant",
    Implementation(
        "cuda", _cuda, cuda_refuses
    ),  # few rows; many it hands to Triton's, whose bits are the same
    Implementation("triton", _triton, triton_refuses),
    Implementation("reference", reference, accepts_floats),
)
