"""New arrays."""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from typing import Any

from mainspring.tensor import _tensor as mt
from mainspring.tensor._tensor import Tensor, ValueOutOfRangeError, float32, float64
from mainspring.tensor._tensor import from_dlpack as _from_dlpack


def _float(dtype: Any) -> Any:
    return float32 if dtype is None else dtype


def asarray(
    obj: Any, /, *, dtype: Any = None, device: Any = None, copy: builtins.bool | None = None
) -> Tensor:
    if isinstance(obj, Tensor):
        if copy is False and dtype is not None and dtype is not obj.dtype:
            raise ValueOutOfRangeError("asarray: another dtype needs a copy")
        out = obj if dtype is None else obj.to(dtype)
        return mt.clone(out) if copy and out is obj else out
    if copy is False:
        if hasattr(obj, "__dlpack__"):
            return _from_dlpack(obj)
        raise ValueOutOfRangeError("asarray: numbers and lists need a copy")
    return mt.tensor(obj, dtype=dtype)


def _shape(shape: int | Sequence[int]) -> tuple[int, ...]:
    return (shape,) if isinstance(shape, int) else tuple(shape)


def empty(shape: int | Sequence[int], *, dtype: Any = None, device: Any = None) -> Tensor:
    return mt.empty(_shape(shape), dtype=_float(dtype))


def zeros(shape: int | Sequence[int], *, dtype: Any = None, device: Any = None) -> Tensor:
    return mt.zeros(_shape(shape), dtype=_float(dtype))


def ones(shape: int | Sequence[int], *, dtype: Any = None, device: Any = None) -> Tensor:
    return mt.ones(_shape(shape), dtype=_float(dtype))


def full(shape: int | Sequence[int], fill_value: Any, *, dtype: Any = None, device: Any = None) -> Tensor:
    return mt.clone(mt.tensor(fill_value, dtype=dtype).expand(_shape(shape)))


def empty_like(x: Tensor, /, *, dtype: Any = None, device: Any = None) -> Tensor:
    return mt.empty_like(x, dtype=dtype)


def zeros_like(x: Tensor, /, *, dtype: Any = None, device: Any = None) -> Tensor:
    return mt.zeros_like(x, dtype=dtype)


def ones_like(x: Tensor, /, *, dtype: Any = None, device: Any = None) -> Tensor:
    return mt.ones_like(x, dtype=dtype)


def full_like(x: Tensor, /, fill_value: Any, *, dtype: Any = None, device: Any = None) -> Tensor:
    return full(x.shape, fill_value, dtype=dtype or x.dtype)


def arange(
    start: float, /, stop: float | None = None, step: float = 1, *, dtype: Any = None, device: Any = None
) -> Tensor:
    return mt.arange(start, stop, step, dtype=dtype)


def linspace(
    start: float,
    stop: float,
    /,
    num: int,
    *,
    dtype: Any = None,
    device: Any = None,
    endpoint: builtins.bool = True,
) -> Tensor:
    steps = num - 1 if endpoint else num
    if num == 0:
        return mt.zeros(0, dtype=_float(dtype))
    positions = mt.arange(num, dtype=float64)
    out = positions * ((stop - start) / steps if steps else 0.0) + float(start)
    if endpoint and num > 1:
        out[-1] = float(stop)
    return out.to(_float(dtype))


def eye(
    n_rows: int, n_cols: int | None = None, /, *, k: int = 0, dtype: Any = None, device: Any = None
) -> Tensor:
    columns = n_rows if n_cols is None else n_cols
    rows = mt.arange(n_rows).reshape(n_rows, 1)
    return (mt.arange(columns).reshape(1, columns) - rows == k).to(_float(dtype))


def from_dlpack(x: Any, /, *, device: Any = None, copy: builtins.bool | None = None) -> Tensor:
    out = _from_dlpack(x)
    return mt.clone(out) if copy else out


def meshgrid(*arrays: Tensor, indexing: str = "xy") -> list[Tensor]:
    return [mt.clone(t) for t in mt.meshgrid(list(arrays), indexing)]


def tril(x: Tensor, /, *, k: int = 0) -> Tensor:
    return mt.tril(x, k)


def triu(x: Tensor, /, *, k: int = 0) -> Tensor:
    return mt.triu(x, k)
