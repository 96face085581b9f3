"""Products of matrices and vectors, and the transpose."""

from __future__ import annotations

from collections.abc import Sequence

from mainspring.tensor import _tensor as mt
from mainspring.tensor._tensor import Tensor
from mainspring.tensor.array_api.dtypes import result_type

matmul = mt.matmul


def matrix_transpose(x: Tensor, /) -> Tensor:
    return x.mT


def tensordot(x1: Tensor, x2: Tensor, /, *, axes: int | tuple[Sequence[int], Sequence[int]] = 2) -> Tensor:
    kind = result_type(x1, x2)
    x1, x2 = x1.to(kind), x2.to(kind)
    if isinstance(axes, int):
        return mt.tensordot(x1, x2, axes)
    left = [a % x1.ndim for a in axes[0]]
    right = [a % x2.ndim for a in axes[1]]
    first = mt.permute(x1, [d for d in range(x1.ndim) if d not in left] + left)
    second = mt.permute(x2, right + [d for d in range(x2.ndim) if d not in right])
    return mt.tensordot(first, second, len(left))


def vecdot(x1: Tensor, x2: Tensor, /, *, axis: int = -1) -> Tensor:
    kind = result_type(x1, x2)
    if not -min(x1.ndim, x2.ndim) <= axis < 0:
        raise mt.IndexOutOfRangeError(f"vecdot: axis {axis} must be negative and within both arrays")
    if x1.shape[axis] != x2.shape[axis]:
        raise mt.ShapeError(f"vecdot: {tuple(x1.shape)} and {tuple(x2.shape)} differ along axis {axis}")
    left, right = mt.movedim(x1.to(kind), axis, -1), mt.movedim(x2.to(kind), axis, -1)
    return mt.sum(left * right, -1).to(kind)
