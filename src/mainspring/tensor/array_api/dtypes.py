"""Dtypes of the standard: their limits, kinds and promotion."""

from __future__ import annotations

import builtins
from dataclasses import dataclass
from typing import Any

from mainspring.tensor import _tensor as mt
from mainspring.tensor._tensor import (
    DTypeError,
    Tensor,
    ValueOutOfRangeError,
    bfloat16,
    float16,
    float32,
    float64,
    int8,
    int16,
    int32,
    int64,
    uint8,
)

bool = mt.bool
_SIGNED, _UNSIGNED = (int8, int16, int32, int64), (uint8,)
_REAL = (float32, float64, float16, bfloat16)
_KINDS: dict[str, tuple[Any, ...]] = {
    "bool": (bool,),
    "signed integer": _SIGNED,
    "unsigned integer": _UNSIGNED,
    "integral": _SIGNED + _UNSIGNED,
    "real floating": _REAL,
    "complex floating": (),
    "numeric": _SIGNED + _UNSIGNED + _REAL,
}


@dataclass(frozen=True)
class finfo_object:
    bits: int
    eps: float
    max: float
    min: float
    smallest_normal: float
    dtype: Any


@dataclass(frozen=True)
class iinfo_object:
    bits: int
    max: int
    min: int
    dtype: Any


def _dtype_of(x: Any) -> Any:
    return x.dtype if isinstance(x, Tensor) else x


def finfo(type: Any, /) -> finfo_object:
    kind = _dtype_of(type)
    digits, least, most = {
        float16: (10, -14, 65504.0),
        bfloat16: (7, -126, (2 - 2.0**-7) * 2.0**127),
        float32: (23, -126, (2 - 2.0**-23) * 2.0**127),
        float64: (52, -1022, (2 - 2.0**-52) * 2.0**1023),
    }[kind]
    return finfo_object(8 * kind.itemsize, 2.0**-digits, most, -most, 2.0**least, kind)


def iinfo(type: Any, /) -> iinfo_object:
    kind = _dtype_of(type)
    bits = 8 * kind.itemsize
    if kind is uint8:
        return iinfo_object(bits, 2**bits - 1, 0, kind)
    return iinfo_object(bits, 2 ** (bits - 1) - 1, -(2 ** (bits - 1)), kind)


def isdtype(dtype: Any, kind: Any) -> builtins.bool:
    if isinstance(kind, tuple):
        return any(isdtype(dtype, k) for k in kind)
    if isinstance(kind, str):
        if kind not in _KINDS:
            raise ValueOutOfRangeError(f"the kind {kind!r} is not one of {', '.join(_KINDS)}")
        return dtype in _KINDS[kind]
    return dtype is kind


def result_type(*arrays_and_dtypes: Any) -> Any:
    dtypes = [_dtype_of(x) for x in arrays_and_dtypes if not isinstance(x, (builtins.bool, int, float))]
    if not dtypes:
        raise ValueOutOfRangeError("result_type needs an array or a dtype")
    zeros = [mt.zeros(1, dtype=d) for d in dtypes]
    out = zeros[0]
    for z in zeros[1:]:
        out = mt.add(out, z)
    for x in arrays_and_dtypes:
        if isinstance(x, (builtins.bool, int, float)):
            out = mt.add(out, x)
    return out.dtype


def can_cast(from_: Any, to: Any, /) -> builtins.bool:
    source = _dtype_of(from_)
    try:
        return (
            result_type(source, to) is to
            and (source is not bool or to is bool)
            and _category(source) == _category(to)
        )
    except DTypeError:
        return False


def _category(kind: Any) -> str:
    return next(name for name in ("bool", "integral", "real floating") if kind in _KINDS[name])


def astype(x: Tensor, dtype: Any, /, *, copy: builtins.bool = True, device: Any = None) -> Tensor:
    out = x.to(dtype)
    return mt.clone(out) if copy and out is x else out
