"""The array API standard (2024.12) for the dtypes of mainspring.tensor: `import mainspring.tensor.array_api as xp`.

Names, arguments and promotion are the standard's; the arrays are our tensors. Of its dtypes uint16, uint32, uint64
and the complex ones are missing; bfloat16 and float16 are ours beyond it.
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
from mainspring.tensor._tensor import (
    from_dlpack as _from_dlpack,
)

bool = mt.bool
Array = Tensor
e, inf, nan, pi, newaxis = math.e, math.inf, math.nan, math.pi, None
__array_api_version__ = "2024.12"

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
Axis = int | tuple[int, ...] | None

# ---- dtypes ----


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
        return any_of(isdtype(dtype, k) for k in kind)
    if isinstance(kind, str):
        if kind not in _KINDS:
            raise ValueOutOfRangeError(f"the kind {kind!r} is not one of {', '.join(_KINDS)}")
        return dtype in _KINDS[kind]
    return dtype is kind


any_of = builtins.any


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


# ---- creation ----


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


# ---- elements ----

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


# ---- linear algebra ----

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
    if not -builtins.min(x1.ndim, x2.ndim) <= axis < 0:
        raise mt.IndexOutOfRangeError(f"vecdot: axis {axis} must be negative and within both arrays")
    if x1.shape[axis] != x2.shape[axis]:
        raise mt.ShapeError(f"vecdot: {tuple(x1.shape)} and {tuple(x2.shape)} differ along axis {axis}")
    left, right = mt.movedim(x1.to(kind), axis, -1), mt.movedim(x2.to(kind), axis, -1)
    return mt.sum(left * right, -1).to(kind)


# ---- shapes ----


def broadcast_arrays(*arrays: Tensor) -> list[Tensor]:
    return list(mt.broadcast_tensors(list(arrays)))


def broadcast_shapes(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(mt.broadcast_tensors([mt.zeros(()).expand(s) for s in shapes])[0].shape)


def broadcast_to(x: Tensor, /, shape: Sequence[int]) -> Tensor:
    return mt.broadcast_to(x, tuple(shape))


def concat(arrays: Sequence[Tensor], /, *, axis: int | None = 0) -> Tensor:
    if axis is None:
        return mt.cat([a.reshape(-1) for a in arrays], 0)
    return mt.cat(list(arrays), axis)


def expand_dims(x: Tensor, /, axis: int | tuple[int, ...]) -> Tensor:
    axes = (axis,) if isinstance(axis, int) else axis
    total = x.ndim + len(axes)
    for a in sorted(mt_wrap(a, total) for a in axes):
        x = mt.unsqueeze(x, a)
    return x


def mt_wrap(axis: int, ndim: int) -> int:
    if not -ndim <= axis < ndim:
        raise mt.IndexOutOfRangeError(f"axis {axis} is out of range for {ndim} dimensions")
    return axis % ndim


def flip(x: Tensor, /, *, axis: Axis = None) -> Tensor:
    axes = tuple(range(x.ndim)) if axis is None else (axis,) if isinstance(axis, int) else axis
    return mt.flip(x, axes)


def moveaxis(x: Tensor, source: int | tuple[int, ...], destination: int | tuple[int, ...], /) -> Tensor:
    return mt.movedim(x, source, destination)


def permute_dims(x: Tensor, /, axes: tuple[int, ...]) -> Tensor:
    return mt.permute(x, tuple(axes))


def repeat(x: Tensor, repeats: int | Tensor, /, *, axis: int | None = None) -> Tensor:
    return mt.repeat_interleave(x, repeats, axis)


def reshape(x: Tensor, /, shape: Sequence[int], *, copy: builtins.bool | None = None) -> Tensor:
    if copy is False:
        return x.view(tuple(shape))
    out = mt.reshape(x, tuple(shape))
    return mt.clone(out) if copy else out


def roll(x: Tensor, /, shift: int | tuple[int, ...], *, axis: Axis = None) -> Tensor:
    if axis is None:
        return mt.roll(x, shift)
    axes = (axis,) if isinstance(axis, int) else axis
    shifts = (shift,) * len(axes) if isinstance(shift, int) else shift
    return mt.roll(x, shifts, axes)


def squeeze(x: Tensor, /, axis: int | tuple[int, ...]) -> Tensor:
    axes = sorted({mt_wrap(a, x.ndim) for a in ((axis,) if isinstance(axis, int) else axis)}, reverse=True)
    for a in axes:
        if x.shape[a] != 1:
            raise mt.ShapeError(f"squeeze: dimension {a} of shape {tuple(x.shape)} is not 1")
        x = mt.squeeze(x, a)
    return x


def stack(arrays: Sequence[Tensor], /, *, axis: int = 0) -> Tensor:
    kind = result_type(*arrays)
    return mt.stack([a.to(kind) for a in arrays], axis)


def tile(x: Tensor, repetitions: tuple[int, ...], /) -> Tensor:
    return mt.tile(x, tuple(repetitions)) if repetitions else mt.clone(x)


def unstack(x: Tensor, /, *, axis: int = 0) -> tuple[Tensor, ...]:
    return mt.unbind(x, axis)


# ---- choosing ----


def take(x: Tensor, indices: Tensor, /, *, axis: int | None = None) -> Tensor:
    out = mt.index_select(x, 0 if axis is None else axis, indices.reshape(-1))
    if indices.ndim == 1:
        return out
    d = 0 if axis is None else axis % x.ndim
    return mt.reshape(out, (*x.shape[:d], *indices.shape, *x.shape[d + 1 :]))


def take_along_axis(x: Tensor, indices: Tensor, /, *, axis: int = -1) -> Tensor:
    return mt.take_along_dim(x, indices, axis)


def argmax(x: Tensor, /, *, axis: int | None = None, keepdims: builtins.bool = False) -> Tensor:
    out = mt.argmax(x, axis, keepdims)
    return out.reshape((1,) * x.ndim) if axis is None and keepdims else out


def argmin(x: Tensor, /, *, axis: int | None = None, keepdims: builtins.bool = False) -> Tensor:
    out = mt.argmin(x, axis, keepdims)
    return out.reshape((1,) * x.ndim) if axis is None and keepdims else out


def count_nonzero(x: Tensor, /, *, axis: Axis = None, keepdims: builtins.bool = False) -> Tensor:
    return sum((x != 0), axis=axis, keepdims=keepdims)


def nonzero(x: Tensor, /) -> tuple[Tensor, ...]:
    if x.ndim == 0:
        raise ValueOutOfRangeError("nonzero: an array without dimensions has no positions")
    return tuple(mt.clone(t) for t in mt.unbind(mt.nonzero(x), 1))


def searchsorted(x1: Tensor, x2: Tensor, /, *, side: str = "left", sorter: Tensor | None = None) -> Tensor:
    ordered = x1 if sorter is None else mt.index_select(x1, 0, sorter)
    return mt.searchsorted(ordered, x2, side == "right")


def argsort(
    x: Tensor, /, *, axis: int = -1, descending: builtins.bool = False, stable: builtins.bool = True
) -> Tensor:
    return mt.argsort(x, axis, descending, stable)


def sort(
    x: Tensor, /, *, axis: int = -1, descending: builtins.bool = False, stable: builtins.bool = True
) -> Tensor:
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


def isin(x1: Any, x2: Any, /, *, invert: builtins.bool = False) -> Tensor:
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


# ---- reductions ----


def _axes(x: Tensor, axis: Axis) -> Any:
    """Our functions read an empty list of dimensions as all of them: the standard as none."""
    return None if axis is None else axis


def _reduced(name: str, x: Tensor, axis: Axis, keepdims: builtins.bool) -> Tensor:
    if axis == () and isinstance(axis, tuple):
        one: Tensor = getattr(mt, name)(mt.unsqueeze(x, -1), -1)
        return one
    out: Tensor = getattr(mt, name)(x, _axes(x, axis), keepdims)
    return out


def sum(x: Tensor, /, *, axis: Axis = None, dtype: Any = None, keepdims: builtins.bool = False) -> Tensor:
    return _wide("sum", x, axis, dtype, keepdims)


def prod(x: Tensor, /, *, axis: Axis = None, dtype: Any = None, keepdims: builtins.bool = False) -> Tensor:
    return _wide("prod", x, axis, dtype, keepdims)


def _wide(name: str, x: Tensor, axis: Axis, dtype: Any, keepdims: builtins.bool) -> Tensor:
    out = _reduced(name, x if dtype is None else x.to(dtype), axis, keepdims)
    return out if dtype is None else out.to(dtype)


def max(x: Tensor, /, *, axis: Axis = None, keepdims: builtins.bool = False) -> Tensor:
    return _reduced("amax", x, axis, keepdims)


def min(x: Tensor, /, *, axis: Axis = None, keepdims: builtins.bool = False) -> Tensor:
    return _reduced("amin", x, axis, keepdims)


def mean(x: Tensor, /, *, axis: Axis = None, keepdims: builtins.bool = False) -> Tensor:
    return _reduced("mean", x, axis, keepdims)


def all(x: Tensor, /, *, axis: Axis = None, keepdims: builtins.bool = False) -> Tensor:
    return _reduced("all", x, axis, keepdims)


def any(x: Tensor, /, *, axis: Axis = None, keepdims: builtins.bool = False) -> Tensor:
    return _reduced("any", x, axis, keepdims)


def var(
    x: Tensor, /, *, axis: Axis = None, correction: float = 0.0, keepdims: builtins.bool = False
) -> Tensor:
    if isinstance(axis, tuple) and not axis:
        return mt.var(mt.unsqueeze(x, -1), -1, False, correction)
    return mt.var(x, axis, keepdims, correction)


def std(
    x: Tensor, /, *, axis: Axis = None, correction: float = 0.0, keepdims: builtins.bool = False
) -> Tensor:
    return mt.sqrt(var(x, axis=axis, correction=correction, keepdims=keepdims))


def cumulative_sum(
    x: Tensor, /, *, axis: int | None = None, dtype: Any = None, include_initial: builtins.bool = False
) -> Tensor:
    return _cumulative(mt.cumsum, 0, x, axis, dtype, include_initial)


def cumulative_prod(
    x: Tensor, /, *, axis: int | None = None, dtype: Any = None, include_initial: builtins.bool = False
) -> Tensor:
    return _cumulative(mt.cumprod, 1, x, axis, dtype, include_initial)


def _cumulative(
    function: Any, initial: int, x: Tensor, axis: int | None, dtype: Any, include_initial: builtins.bool
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
        out = mt.cat([full(shape, initial, dtype=out.dtype), out], axis)
    return out


def diff(
    x: Tensor, /, *, axis: int = -1, n: int = 1, prepend: Tensor | None = None, append: Tensor | None = None
) -> Tensor:
    return mt.diff(x, n, axis, prepend, append)


# ---- inspection ----


class _Info:
    def capabilities(self) -> dict[str, Any]:
        return {"boolean indexing": True, "data-dependent shapes": True, "max dimensions": 8}

    def default_device(self) -> str:
        return "cpu"

    def default_dtypes(self, *, device: Any = None) -> dict[str, Any]:
        return {"real floating": float32, "complex floating": None, "integral": int64, "indexing": int64}

    def devices(self) -> list[str]:
        return ["cpu"]

    def dtypes(self, *, device: Any = None, kind: Any = None) -> dict[str, Any]:
        names = ("bool", "int8", "int16", "int32", "int64", "uint8", "float32", "float64")
        known = {name: getattr(mt, name) for name in names}
        return {k: v for k, v in known.items() if kind is None or isdtype(v, kind)}


def __array_namespace_info__() -> _Info:
    return _Info()
