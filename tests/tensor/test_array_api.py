"""Our namespace of the array API against array-api-strict, which raises where a call leaves the standard."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import array_api_strict as strict
import numpy as np
import pytest

import mainspring.tensor as mt
import mainspring.tensor.array_api as xp

Call = Callable[..., Any]
FLOATS = np.random.default_rng(0).standard_normal((3, 4))
POSITIVE, UNIT = np.abs(FLOATS) + 0.5, np.tanh(FLOATS)
INTS = np.random.default_rng(1).integers(-6, 7, (3, 4))
BOOLS = INTS > 0

UNARY = {
    **dict.fromkeys(
        [
            "abs",
            "atan",
            "cos",
            "cosh",
            "exp",
            "expm1",
            "sin",
            "sinh",
            "tan",
            "tanh",
            "asinh",
            "square",
            "ceil",
            "floor",
            "round",
            "trunc",
        ],
        FLOATS,
    ),
    **dict.fromkeys(["negative", "positive", "sign", "signbit", "isfinite", "isinf", "isnan"], FLOATS),
    **dict.fromkeys(["log", "log10", "log1p", "log2", "sqrt", "reciprocal"], POSITIVE),
    **dict.fromkeys(["acos", "asin", "atanh"], UNIT),
    "acosh": POSITIVE + 1,
    "logical_not": BOOLS,
    "bitwise_invert": INTS,
}
BINARY = {
    **dict.fromkeys(
        ["add", "subtract", "multiply", "divide", "pow", "atan2", "hypot", "copysign", "logaddexp"],
        (FLOATS, POSITIVE),
    ),
    **dict.fromkeys(["maximum", "minimum", "nextafter", "floor_divide", "remainder"], (FLOATS, POSITIVE)),
    **dict.fromkeys(["equal", "not_equal", "less", "less_equal", "greater", "greater_equal"], (FLOATS, UNIT)),
    **{name: (INTS, INTS[::-1].copy()) for name in ["bitwise_and", "bitwise_or", "bitwise_xor"]},
    **{name: (INTS, np.abs(INTS)) for name in ["bitwise_left_shift", "bitwise_right_shift"]},
    **{name: (BOOLS, BOOLS[::-1].copy()) for name in ["logical_and", "logical_or", "logical_xor"]},
    "floor_divide": (INTS, np.abs(INTS) + 1),
    "remainder": (INTS, -np.abs(INTS) - 1),
    "matmul": (FLOATS, FLOATS.T.copy()),
    "vecdot": (FLOATS, POSITIVE),
}
BINARY["pow"] = (POSITIVE, FLOATS)

OTHERS: list[tuple[str, Call, list[np.ndarray]]] = [
    ("sum", lambda m, x: m.sum(x, axis=0, keepdims=True), [FLOATS]),
    ("sum", lambda m, x: m.sum(x), [INTS]),
    ("prod", lambda m, x: m.prod(x, axis=(0, 1)), [POSITIVE]),
    ("mean", lambda m, x: m.mean(x, axis=-1), [FLOATS]),
    ("var", lambda m, x: m.var(x, axis=1, correction=1.0), [FLOATS]),
    ("std", lambda m, x: m.std(x), [FLOATS]),
    ("max", lambda m, x: m.max(x, axis=0), [INTS]),
    ("min", lambda m, x: m.min(x), [FLOATS]),
    ("all", lambda m, x: m.all(x, axis=0), [BOOLS]),
    ("any", lambda m, x: m.any(x), [BOOLS]),
    ("argmax", lambda m, x: m.argmax(x, axis=1), [FLOATS]),
    ("argmin", lambda m, x: m.argmin(x, axis=0, keepdims=True), [FLOATS]),
    ("count_nonzero", lambda m, x: m.count_nonzero(x, axis=0), [INTS]),
    ("cumulative_sum", lambda m, x: m.cumulative_sum(x, axis=1, include_initial=True), [FLOATS]),
    ("cumulative_prod", lambda m, x: m.cumulative_prod(x, axis=0), [POSITIVE]),
    ("diff", lambda m, x: m.diff(x, axis=0), [FLOATS]),
    ("sort", lambda m, x: m.sort(x, axis=0, descending=True), [FLOATS]),
    ("argsort", lambda m, x: m.argsort(x), [FLOATS]),
    ("searchsorted", lambda m, x: m.searchsorted(m.sort(x[0, :]), x[1, :], side="right"), [FLOATS]),
    ("unique_values", lambda m, x: m.unique_values(x), [INTS]),
    ("unique_counts", lambda m, x: m.unique_counts(x)[1], [INTS]),
    ("nonzero", lambda m, x: m.nonzero(x)[1], [INTS]),
    ("where", lambda m, c, x, y: m.where(c, x, y), [BOOLS, FLOATS, POSITIVE]),
    ("clip", lambda m, x: m.clip(x, -0.5, 0.5), [FLOATS]),
    ("take", lambda m, x: m.take(x, m.asarray([2, 0]), axis=1), [FLOATS]),
    ("take_along_axis", lambda m, x: m.take_along_axis(x, m.argsort(x, axis=0), axis=0), [FLOATS]),
    ("tensordot", lambda m, x, y: m.tensordot(x, y, axes=((1,), (1,))), [FLOATS, POSITIVE]),
    ("matrix_transpose", lambda m, x: m.matrix_transpose(x), [FLOATS]),
    ("concat", lambda m, x, y: m.concat([x, y], axis=1), [FLOATS, POSITIVE]),
    ("stack", lambda m, x, y: m.stack([x, y], axis=-1), [FLOATS, POSITIVE]),
    ("unstack", lambda m, x: m.unstack(x, axis=1)[2], [FLOATS]),
    ("expand_dims", lambda m, x: m.expand_dims(x, axis=1), [FLOATS]),
    ("squeeze", lambda m, x: m.squeeze(m.expand_dims(x, axis=0), axis=0), [FLOATS]),
    ("flip", lambda m, x: m.flip(x, axis=1), [FLOATS]),
    ("roll", lambda m, x: m.roll(x, 2, axis=1), [FLOATS]),
    ("repeat", lambda m, x: m.repeat(x, 2, axis=0), [FLOATS]),
    ("tile", lambda m, x: m.tile(x, (2, 1)), [FLOATS]),
    ("reshape", lambda m, x: m.reshape(x, (2, -1)), [FLOATS]),
    ("permute_dims", lambda m, x: m.permute_dims(x, (1, 0)), [FLOATS]),
    ("moveaxis", lambda m, x: m.moveaxis(x, 0, 1), [FLOATS]),
    ("broadcast_to", lambda m, x: m.broadcast_to(x, (2, 3, 4)), [FLOATS]),
    ("tril", lambda m, x: m.tril(x, k=1), [FLOATS]),
    ("triu", lambda m, x: m.triu(x, k=-1), [FLOATS]),
    ("eye", lambda m, x: m.eye(3, 4, k=1, dtype=m.float64), [FLOATS]),
    ("linspace", lambda m, x: m.linspace(0.0, 1.0, 5, endpoint=False, dtype=m.float64), [FLOATS]),
    ("arange", lambda m, x: m.arange(1, 10, 3, dtype=m.int64), [FLOATS]),
    ("meshgrid", lambda m, x: m.meshgrid(x[0, :], x[1, :])[1], [FLOATS]),
    ("astype", lambda m, x: m.astype(x, m.int32), [FLOATS]),
]


def compare(call: Call, arrays: list[np.ndarray]) -> None:
    got, want = call(xp, *(xp.asarray(a) for a in arrays)), call(strict, *(strict.asarray(a) for a in arrays))
    assert got.dtype.name == str(want.dtype).removeprefix("array_api_strict.")
    assert tuple(got.shape) == tuple(want.shape)
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(UNARY))
def test_functions_of_one_array(name: str) -> None:
    compare(lambda m, x: getattr(m, name)(x), [UNARY[name]])


@pytest.mark.parametrize("name", sorted(BINARY))
def test_functions_of_two_arrays(name: str) -> None:
    compare(lambda m, x, y: getattr(m, name)(x, y), list(BINARY[name]))


@pytest.mark.parametrize(("name", "call", "arrays"), OTHERS, ids=[name for name, *_ in OTHERS])
def test_other_functions(name: str, call: Call, arrays: list[np.ndarray]) -> None:
    compare(call, arrays)


@pytest.mark.parametrize("left", ["bool", "int8", "int16", "int32", "int64", "uint8", "float32", "float64"])
@pytest.mark.parametrize("right", ["bool", "int8", "int16", "int32", "int64", "uint8", "float32", "float64"])
def test_promotion_where_the_standard_defines_it(left: str, right: str) -> None:
    try:
        want = strict.result_type(getattr(strict, left), getattr(strict, right))
    except TypeError:
        return
    assert xp.result_type(getattr(xp, left), getattr(xp, right)).name == str(want).removeprefix(
        "array_api_strict."
    )


def test_the_namespace_is_complete_but_for_complex_numbers() -> None:
    missing = {
        name
        for name, value in vars(strict).items()
        if inspect.isfunction(value) and not name.startswith("_") and not hasattr(xp, name)
    }
    assert missing <= {
        "conj", "imag", "real", "set_array_api_strict_flags", "get_array_api_strict_flags",
        "reset_array_api_strict_flags",
    }  # fmt: skip
    x = mt.ones(2)
    assert x.__array_namespace__() is xp
    assert x.to_device(x.device) is x
    assert xp.finfo(xp.float32).eps == np.finfo(np.float32).eps
    assert (xp.iinfo(xp.int16).min, xp.iinfo(xp.uint8).max) == (-32768, 255)
    assert xp.isdtype(xp.int8, "signed integer")
    assert not xp.can_cast(xp.float64, xp.float32)
    assert set(xp.__array_namespace_info__().dtypes(kind="real floating")) == {"float32", "float64"}
