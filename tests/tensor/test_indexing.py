"""Indexing and broadcasting against NumPy, on keys and shapes that hypothesis makes up."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import mainspring.tensor as mt

SHAPES = st.lists(st.integers(0, 4), min_size=1, max_size=4).map(tuple)


@st.composite
def keys(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Ints, slices, None, ..., masks and index arrays that broadcast against each other."""
    common = draw(st.sampled_from([(2,), (1,), (3, 2), ()]))
    parts: list[Any] = []
    d = 0
    while d < len(shape):
        kind = draw(st.sampled_from(["slice", "int", "array", "mask", "none", "stop"]))
        size = shape[d]
        if kind == "stop":
            break
        if kind == "none":
            # A tensor has at most 8 dimensions, also before the advanced ones are joined.
            if sum(part is None for part in parts) < 3:
                parts.append(None)
            continue
        if kind == "slice" or size == 0:
            ends = st.one_of(st.none(), st.integers(-size - 1, size + 1))
            parts.append(slice(draw(ends), draw(ends), draw(st.sampled_from([None, 1, 2, -1, -2]))))
        elif kind == "int":
            parts.append(draw(st.integers(-size, size - 1)))
        elif kind == "array":
            own = draw(st.sampled_from([common, common[-1:], ()]))
            parts.append(draw(npst.arrays(np.int64, own, elements=st.integers(-size, size - 1))))
        else:
            hits = (
                draw(st.lists(st.integers(0, size - 1), min_size=common[-1] if common else 1, unique=True))
                if size >= 3
                else [0]
            )
            mask = np.zeros(size, dtype=bool)
            mask[hits[: common[-1] if common else 1]] = True
            parts.append(mask)
        d += 1
    if d < len(shape) and draw(st.booleans()):
        parts.append(...)
    return tuple(parts)


def ours(key: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(mt.tensor(k) if isinstance(k, np.ndarray) else k for k in key)


def outcome(call: Any) -> Any:
    try:
        return call()
    except (IndexError, ValueError):
        return "error"


@settings(max_examples=400, deadline=None, database=None)
@given(data=st.data(), shape=SHAPES)
def test_reading_and_writing_follow_numpy(data: st.DataObject, shape: tuple[int, ...]) -> None:
    array = np.arange(float(np.prod(shape))).reshape(shape)
    key = data.draw(keys(shape))
    want = outcome(lambda: array[key])
    tensor = mt.tensor(array)
    got = outcome(lambda: tensor[ours(key)])
    if isinstance(want, str):
        assert isinstance(got, str)
        return
    np.testing.assert_array_equal(got.numpy(), want)
    assert got.shape == np.shape(want)
    # Writing: a value of the part's own shape, unless places repeat (then the last counts, in an order left open).
    value = -1.0 - np.arange(float(np.size(want))).reshape(np.shape(want))
    if len(np.unique(want)) == np.size(want):
        written, target = array.copy(), mt.tensor(array)
        written[key] = value
        target[ours(key)] = mt.tensor(value)
        np.testing.assert_array_equal(target.numpy(), written)
        target[ours(key)] = 7.0
        written[key] = 7.0
        np.testing.assert_array_equal(target.numpy(), written)
    # The gradient counts how often each element was read.
    leaf = mt.tensor(array).requires_grad_()
    leaf[ours(key)].sum().backward()
    counts = np.zeros_like(array)
    np.add.at(counts, key, 1.0)
    if leaf.grad is not None:
        np.testing.assert_array_equal(leaf.grad.numpy(), counts)


@settings(max_examples=200, deadline=None, database=None)
@given(shapes=npst.mutually_broadcastable_shapes(num_shapes=3, max_dims=5, max_side=4))
def test_broadcasting_follows_numpy(shapes: npst.BroadcastableShapes) -> None:
    rng = np.random.default_rng(0)
    a, b, c = (rng.integers(-5, 6, s).astype(np.float64) for s in shapes.input_shapes)
    x, y, z = (mt.tensor(v) for v in (a, b, c))
    np.testing.assert_array_equal((x + y * z).numpy(), a + b * c)
    np.testing.assert_array_equal(mt.where(x > y, y, z).numpy(), np.where(a > b, b, c))
    np.testing.assert_array_equal(mt.maximum(x, z).numpy(), np.maximum(a, c))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_mixture_of_short_keys(count: int) -> None:
    array = np.arange(2.0 * 3 * 4).reshape(2, 3, 4)
    tensor = mt.tensor(array)
    items: list[Any] = [0, -1, slice(None), slice(None, None, -1), None, ..., [1, 0], np.array([[0], [1]])]
    for key in itertools.product(items, repeat=count):
        want = outcome(lambda key=key: array[tuple(key)])
        got = outcome(lambda key=key: tensor[ours(tuple(key))])
        if isinstance(want, str):
            assert isinstance(got, str), key
        else:
            np.testing.assert_array_equal(got.numpy(), want, err_msg=str(key))
