"""Functions of each element."""

from __future__ import annotations

from typing import Any

from mainspring.tensor import _tensor as mt
from mainspring.tensor._tensor import Tensor, bfloat16, float16, float32, float64, int16, int32, int64, uint8
from mainspring.tensor.array_api.dtypes import result_type

acos, acosh, asin, asinh, atan, atanh = mt.acos, mt.acosh, mt.asin, mt.asinh, mt.atan, mt.atanh
cos, cosh, sin, sinh, tan, tanh = mt.cos, mt.cosh, mt.sin, mt.sinh, mt.tan, mt.tanh
exp, expm1, log, log10, log1p, log2, sqrt = mt.exp, mt.expm1, mt.log, mt.log10, mt.log1p, mt.log2, mt.sqrt
ceil, floor, round, trunc = mt.ceil, mt.floor, mt.round, mt.trunc
negative, positive, reciprocal, sign, signbit = mt.neg, mt.positive, mt.reciprocal, mt.sign, mt.signbit
isfinite, isinf, isnan, logical_not, bitwise_invert = (
    mt.isfinite,
    mt.isinf,
    mt.isnan,
    mt.logical_not,
    mt.bitwise_not,
)
add, subtract, multiply, divide = mt.add, mt.sub, mt.mul, mt.div
floor_divide, remainder, pow, atan2 = mt.floor_divide, mt.remainder, mt.pow, mt.atan2
hypot, copysign, logaddexp = mt.hypot, mt.copysign, mt.logaddexp
maximum, minimum = mt.maximum, mt.minimum
equal, not_equal, less, less_equal, greater, greater_equal = mt.eq, mt.ne, mt.lt, mt.le, mt.gt, mt.ge
bitwise_and, bitwise_or, bitwise_xor = mt.bitwise_and, mt.bitwise_or, mt.bitwise_xor
bitwise_left_shift, bitwise_right_shift = mt.bitwise_left_shift, mt.bitwise_right_shift
logical_and, logical_or, logical_xor = mt.logical_and, mt.logical_or, mt.logical_xor


def abs(x: Tensor, /) -> Tensor:
    return mt.clone(x) if x.dtype is uint8 else mt.abs(x)


def square(x: Tensor, /) -> Tensor:
    return mt.square(x)


def clip(x: Tensor, /, min: Any = None, max: Any = None) -> Tensor:
    bounds = [b.to(x.dtype) if isinstance(b, Tensor) else b for b in (min, max)]
    out = mt.clip(x, *bounds)
    return out.to(x.dtype)


def nextafter(x1: Any, x2: Any, /) -> Tensor:
    kind = result_type(x1, x2)
    x1, x2 = (x.to(kind) if isinstance(x, Tensor) else mt.tensor(x, dtype=kind) for x in (x1, x2))
    bits = {float32: int32, float64: int64, float16: int16, bfloat16: int16}[x1.dtype]
    x1, x2 = (mt.clone(t) for t in mt.broadcast_tensors([x1, x2]))
    whole = mt.bit_view(x1, bits)
    step = mt.where((x2 > x1) == (x1 > 0), mt.tensor(1, dtype=bits), mt.tensor(-1, dtype=bits))
    moved = mt.bit_view(whole + step, x1.dtype)
    least = mt.copysign(mt.bit_view(mt.ones_like(whole), x1.dtype), x2)
    out = mt.where(x1 == 0, least, moved)
    out = mt.where(x1 == x2, x2, out)
    return mt.where(mt.logical_or(mt.isnan(x1), mt.isnan(x2)), x1 + x2, out)


def where(condition: Tensor, x1: Any, x2: Any, /) -> Tensor:
    return mt.where(condition, x1, x2)
