"""Elements by position, order or membership."""

from __future__ import annotations

from typing import Any, NamedTuple

from mainspring.tensor import _tensor as mt
from mainspring.tensor._tensor import Tensor, ValueOutOfRangeError
from mainspring.tensor.array_api.dtypes import result_type
from mainspring.tensor.array_api.reductions import Axis
from mainspring.tensor.array_api.reductions import sum as _sum


def take(x: Tensor, indices: Tensor, /, *, axis: int | None = None) -> Tensor:
    out = mt.index_select(x, 0 if axis is None else axis, indices.reshape(-1))
    if indices.ndim == 1:
        return out
    d = 0 if axis is None else axis % x.ndim
    return mt.reshape(out, (*x.shape[:d], *indices.shape, *x.shape[d + 1 :]))


def take_along_axis(x: Tensor, indices: Tensor, /, *, axis: int = -1) -> Tensor:
    return mt.take_along_dim(x, indices, axis)


def argmax(x: Tensor, /, *, axis: int | None = None, keepdims: bool = False) -> Tensor:
    out = mt.argmax(x, axis, keepdims)
    return out.reshape((1,) * x.ndim) if axis is None and keepdims else out


def argmin(x: Tensor, /, *, axis: int | None = None, keepdims: bool = False) -> Tensor:
    out = mt.argmin(x, axis, keepdims)
    return out.reshape((1,) * x.ndim) if axis is None and keepdims else out


def count_nonzero(x: Tensor, /, *, axis: Axis = None, keepdims: bool = False) -> Tensor:
    return _sum((x != 0), axis=axis, keepdims=keepdims)


def nonzero(x: Tensor, /) -> tuple[Tensor, ...]:
    if x.ndim == 0:
        raise ValueOutOfRangeError("nonzero: an array without dimensions has no positions")
    return tuple(mt.clone(t) for t in mt.unbind(mt.nonzero(x), 1))


def searchsorted(x1: Tensor, x2: Tensor, /, *, side: str = "left", sorter: Tensor | None = None) -> Tensor:
    ordered = x1 if sorter is None else mt.index_select(x1, 0, sorter)
    return mt.searchsorted(ordered, x2, side == "right")


def argsort(x: Tensor, /, *, axis: int = -1, descending: bool = False, stable: bool = True) -> Tensor:
    return mt.argsort(x, axis, descending, stable)


def sort(x: Tensor, /, *, axis: int = -1, descending: bool = False, stable: bool = True) -> Tensor:
    return mt.sort(x, axis, descending, stable)[0]


class UniqueAll(NamedTuple):
    values: Tensor
    indices: Tensor
    inverse_indices: Tensor
    counts: Tensor


class UniqueCounts(NamedTuple):
    values: Tensor
    counts: Tensor


class UniqueInverse(NamedTuple):
    values: Tensor
    inverse_indices: Tensor


def isin(x1: Any, x2: Any, /, *, invert: bool = False) -> Tensor:
    kind = result_type(x1, x2)
    left, right = (x.to(kind) if isinstance(x, Tensor) else mt.tensor(x, dtype=kind) for x in (x1, x2))
    found = mt.any(left.unsqueeze(-1) == right.reshape(-1), -1)
    return mt.logical_not(found) if invert else found


def unique_all(x: Tensor, /) -> UniqueAll:
    return UniqueAll(*mt.unique_all(x))


def unique_counts(x: Tensor, /) -> UniqueCounts:
    values, _, _, counts = mt.unique_all(x)
    return UniqueCounts(values, counts)


def unique_inverse(x: Tensor, /) -> UniqueInverse:
    values, _, inverse, _ = mt.unique_all(x)
    return UniqueInverse(values, inverse)


def unique_values(x: Tensor, /) -> Tensor:
    return mt.unique_all(x)[0]
