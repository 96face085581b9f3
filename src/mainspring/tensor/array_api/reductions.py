"""Statistics along axes, and running sums."""

from __future__ import annotations

from typing import Any

from mainspring.tensor import _tensor as mt
from mainspring.tensor._tensor import Tensor, ValueOutOfRangeError
from mainspring.tensor.array_api.creation import full as _full

Axis = int | tuple[int, ...] | None


def _axes(x: Tensor, axis: Axis) -> Any:
    """Our functions read an empty list of dimensions as all of them: the standard as none."""
    return None if axis is None else axis


def _reduced(name: str, x: Tensor, axis: Axis, keepdims: bool) -> Tensor:
    if axis == () and isinstance(axis, tuple):
        one: Tensor = getattr(mt, name)(mt.unsqueeze(x, -1), -1)
        return one
    out: Tensor = getattr(mt, name)(x, _axes(x, axis), keepdims)
    return out


def sum(x: Tensor, /, *, axis: Axis = None, dtype: Any = None, keepdims: bool = False) -> Tensor:
    return _wide("sum", x, axis, dtype, keepdims)


def prod(x: Tensor, /, *, axis: Axis = None, dtype: Any = None, keepdims: bool = False) -> Tensor:
    return _wide("prod", x, axis, dtype, keepdims)


def _wide(name: str, x: Tensor, axis: Axis, dtype: Any, keepdims: bool) -> Tensor:
    out = _reduced(name, x if dtype is None else x.to(dtype), axis, keepdims)
    return out if dtype is None else out.to(dtype)


def max(x: Tensor, /, *, axis: Axis = None, keepdims: bool = False) -> Tensor:
    return _reduced("amax", x, axis, keepdims)


def min(x: Tensor, /, *, axis: Axis = None, keepdims: bool = False) -> Tensor:
    return _reduced("amin", x, axis, keepdims)


def mean(x: Tensor, /, *, axis: Axis = None, keepdims: bool = False) -> Tensor:
    return _reduced("mean", x, axis, keepdims)


def all(x: Tensor, /, *, axis: Axis = None, keepdims: bool = False) -> Tensor:
    return _reduced("all", x, axis, keepdims)


def any(x: Tensor, /, *, axis: Axis = None, keepdims: bool = False) -> Tensor:
    return _reduced("any", x, axis, keepdims)


def var(x: Tensor, /, *, axis: Axis = None, correction: float = 0.0, keepdims: bool = False) -> Tensor:
    if isinstance(axis, tuple) and not axis:
        return mt.var(mt.unsqueeze(x, -1), -1, False, correction)
    return mt.var(x, axis, keepdims, correction)


def std(x: Tensor, /, *, axis: Axis = None, correction: float = 0.0, keepdims: bool = False) -> Tensor:
    return mt.sqrt(var(x, axis=axis, correction=correction, keepdims=keepdims))


def cumulative_sum(
    x: Tensor, /, *, axis: int | None = None, dtype: Any = None, include_initial: bool = False
) -> Tensor:
    return _cumulative(mt.cumsum, 0, x, axis, dtype, include_initial)


def cumulative_prod(
    x: Tensor, /, *, axis: int | None = None, dtype: Any = None, include_initial: bool = False
) -> Tensor:
    return _cumulative(mt.cumprod, 1, x, axis, dtype, include_initial)


def _cumulative(
    function: Any, initial: int, x: Tensor, axis: int | None, dtype: Any, include_initial: bool
) -> Tensor:
    if axis is None:
        if x.ndim > 1:
            raise ValueOutOfRangeError("cumulative_sum: more than one dimension needs an axis")
        axis = 0
    out: Tensor = function(x if dtype is None else x.to(dtype), axis)
    out = out if dtype is None else out.to(dtype)
    if include_initial:
        shape = list(out.shape)
        shape[axis] = 1
        out = mt.cat([_full(shape, initial, dtype=out.dtype), out], axis)
    return out


def diff(
    x: Tensor, /, *, axis: int = -1, n: int = 1, prepend: Tensor | None = None, append: Tensor | None = None
) -> Tensor:
    return mt.diff(x, n, axis, prepend, append)
