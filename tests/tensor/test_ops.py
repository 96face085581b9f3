"""Every op of the table against PyTorch: values, gradients, second gradients, bfloat16."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mainspring.tensor as mt
from tensor.cases import CASES, ELSEWHERE, TORCH, Case, as_torch, ours, theirs
from tensor.op_db import DRIVEN

KINDS = ["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"]

SHAPES = st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple)
IDS = [f"{i}-{case}" for i, case in enumerate(CASES)]


def _fit(case: Case, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (3,) * (case.least_ndim - len(shape)) + shape


def _arrays(case: Case, shape: tuple[int, ...], seed: int = 0) -> list[np.ndarray]:
    return case.inputs(np.random.default_rng(seed), _fit(case, shape))


def _check_equal(result: mt.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    got = as_torch(result)
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_every_op_has_a_case() -> None:
    names = {name for name, *_ in mt.OPS}
    assert names - {case.op for case in CASES} - DRIVEN == ELSEWHERE


@pytest.mark.parametrize("case", CASES, ids=IDS)
@settings(max_examples=20, deadline=None, database=None)
@given(shape=SHAPES, kind=st.sampled_from(["float32", "float64"]), seed=st.integers(0, 99))
def test_values_equal_torchs(case: Case, shape: tuple[int, ...], kind: str, seed: int) -> None:
    arrays = _arrays(case, shape, seed)
    result = case.call(mt, *(ours(a, kind) for a in arrays))
    expected = case.call(TORCH, *(theirs(a, kind) for a in arrays))
    _check_equal(result, expected, 1e-5 if kind == "float32" else 1e-11)


@pytest.mark.parametrize("case", [c for c in CASES if c.differentiable], ids=str)
@settings(max_examples=8, deadline=None, database=None)
@given(shape=SHAPES, seed=st.integers(0, 99))
def test_first_and_second_gradients_equal_torchs(case: Case, shape: tuple[int, ...], seed: int) -> None:
    arrays = _arrays(case, shape, seed)
    rng = np.random.default_rng(seed + 1)
    mine, reference = [ours(a) for a in arrays], [theirs(a) for a in arrays]
    leaves = [i for i, t in enumerate(reference) if t.is_floating_point()]
    for i in leaves:
        mine[i].requires_grad = True
        reference[i].requires_grad = True
    out, expected = case.call(mt, *mine), case.call(TORCH, *reference)
    weight = rng.standard_normal(tuple(expected.shape))
    first = mt.grad(out, [mine[i] for i in leaves], ours(weight), create_graph=True, allow_unused=True)
    wanted = torch.autograd.grad(
        expected, [reference[i] for i in leaves], theirs(weight), create_graph=True, allow_unused=True
    )
    total, total_wanted = mt.zeros(1, dtype=mt.float64), torch.zeros(1, dtype=torch.float64)
    for got, want in zip(first, wanted, strict=True):
        if want is None:
            assert got is None
            continue
        assert got is not None
        _check_equal(got, want.detach(), 1e-9)
        direction = rng.standard_normal(tuple(want.shape))
        total, total_wanted = (
            total + (got * ours(direction)).sum(),
            total_wanted + (want * theirs(direction)).sum(),
        )

    # The fused backward, without a tape, gives the same.
    case.call(mt, *mine).backward(ours(weight))
    for i, want in zip(leaves, wanted, strict=True):
        if want is not None:
            _check_equal(mine[i].grad, want.detach(), 1e-9)

    if not total_wanted.requires_grad:
        return
    second = torch.autograd.grad(total_wanted, [reference[i] for i in leaves], allow_unused=True)
    if total.requires_grad:
        got_second = mt.grad(total, [mine[i] for i in leaves], allow_unused=True)
    else:
        got_second = (None,) * len(leaves)
    for i, got, want in zip(leaves, got_second, second, strict=True):
        zero = torch.zeros(tuple(arrays[i].shape), dtype=torch.float64)
        _check_equal(got if got is not None else ours(zero.numpy()), want if want is not None else zero, 1e-8)


@pytest.mark.parametrize("case", [c for c in CASES if c.differentiable and c.smooth], ids=str)
def test_gradients_are_the_slopes(case: Case) -> None:
    """Central differences in float64, on inputs that are not contiguous."""
    arrays = _arrays(case, (3, 2))
    step = 1e-6

    tensors = [ours(np.ascontiguousarray(a.T)).transpose(0, -1) if a.ndim == 2 else ours(a) for a in arrays]
    for t in tensors:
        if t.dtype.is_floating_point:
            t.requires_grad = True
    out = case.call(mt, *tensors)
    weight = np.cos(np.arange(out.numel())).reshape(out.shape)
    (out * ours(weight)).sum().backward()
    for which, array in enumerate(arrays):
        if not np.issubdtype(array.dtype, np.floating) or tensors[which].grad is None:
            continue
        slopes = np.zeros_like(array)
        for at in np.ndindex(array.shape):
            ends = []
            for sign in (1, -1):
                moved = [a.copy() for a in arrays]
                moved[which][at] += sign * step
                ends.append((case.call(mt, *map(ours, moved)) * ours(weight)).sum().item())
            slopes[at] = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(tensors[which].grad.numpy(), slopes, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", [c for c in CASES if c.differentiable and c.bfloat16], ids=str)
def test_bfloat16_errs_no_more_than_torch(case: Case) -> None:
    """Against the same inputs in float64; a value may differ from torch's by one rounding."""
    arrays = [theirs(a, "bfloat16") for a in _arrays(case, (7, 33))]
    truth = case.call(TORCH, *(a.double() if a.is_floating_point() else a for a in arrays))
    reference = case.call(TORCH, *arrays)
    got = as_torch(case.call(mt, *(mt.from_dlpack(a) for a in arrays)))
    assert got.dtype == torch.bfloat16
    error, torchs = (got.double() - truth).abs(), (reference.double() - truth).abs()
    rounding = truth.abs() * 2.0**-8
    assert (error.max() <= 2 * torchs.max() + rounding.max()).item()


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4)])
def test_empty_tensors_pass_through(shape: tuple[int, ...]) -> None:
    x, reference = mt.zeros(shape, requires_grad=True), torch.zeros(shape, requires_grad=True)
    for call in (
        lambda m, t: m.exp(t) + t * 2,
        lambda m, t: t.sum(),
        lambda m, t: t.reshape(-1),
        lambda m, t: m.cat([t, t]),
        lambda m, t: m.softmax(t, -1),
    ):
        out, expected = call(mt, x), call(TORCH, reference)
        assert out.shape == tuple(expected.shape)
        out.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape


def test_a_matrix_product_over_nothing_is_zero() -> None:
    assert mt.matmul(mt.ones(2, 0), mt.ones(0, 3)).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("kind", ["float32", "float64", "bfloat16"])
@settings(max_examples=20, deadline=None, database=None)
@given(
    m=st.integers(1, 70),
    k=st.integers(1, 90),
    n=st.integers(1, 70),
    turn_a=st.booleans(),
    turn_b=st.booleans(),
)
def test_matrix_products_of_any_size_and_stride(
    kind: str, m: int, k: int, n: int, turn_a: bool, turn_b: bool
) -> None:
    generator = torch.Generator().manual_seed(m * 10007 + k * 101 + n)
    a = torch.randn(m, k, generator=generator, dtype=torch.float64).to(getattr(torch, kind))
    b = torch.randn(k, n, generator=generator, dtype=torch.float64).to(getattr(torch, kind))
    a = a.T.contiguous().T if turn_a else a
    b = b.T.contiguous().T if turn_b else b
    got = as_torch(mt.matmul(mt.from_dlpack(a), mt.from_dlpack(b))).double()
    truth = a.double() @ b.double()
    bound = a.double().abs() @ b.double().abs()
    eps = {"float32": 2.0**-23, "float64": 2.0**-52, "bfloat16": 2.0**-8}[kind]
    steps = 1 if kind == "bfloat16" else k
    assert ((got - truth).abs() <= eps * steps * bound + 1e-30).all()


def test_deep_products_cross_the_blocks_of_k() -> None:
    a, b = torch.randn(5, 1700, dtype=torch.float64), torch.randn(1700, 40, dtype=torch.float64)
    for kind, tolerance in ((torch.float32, 2e-3), (torch.bfloat16, 1.0)):
        x, y = a.to(kind), b.to(kind)
        got = as_torch(mt.matmul(mt.from_dlpack(x), mt.from_dlpack(y))).double()
        torch.testing.assert_close(got, x.double() @ y.double(), rtol=2.0**-7, atol=tolerance)


def test_two_threads_give_the_bits_of_one() -> None:
    x, w = mt.randn(300, 200), mt.randn(400, 200)
    one = mt.linear(x, w).tolist()
    mt.set_num_threads(2)
    assert mt.linear(x, w).tolist() == one


@pytest.mark.parametrize("n", [1, 100, 100_003])
def test_long_sums_stay_accurate(n: int) -> None:
    x = np.random.default_rng(0).random((n, 9), dtype=np.float32)
    for dim in (None, 0, 1):
        np.testing.assert_allclose(mt.tensor(x).sum(dim).numpy(), x.astype(np.float64).sum(dim), rtol=2e-6)


@pytest.mark.parametrize("left", KINDS)
@pytest.mark.parametrize("right", KINDS)
def test_dtypes_are_promoted_as_in_torch(left: str, right: str) -> None:
    for shapes in (((2,), (2,)), ((2,), ()), ((), (2,))):
        x, y = (mt.ones(s, dtype=getattr(mt, k)) for s, k in zip(shapes, (left, right), strict=True))
        p, q = (torch.ones(s, dtype=getattr(torch, k)) for s, k in zip(shapes, (left, right), strict=True))
        assert as_torch(x * y).dtype == (p * q).dtype
        assert as_torch(x / y).dtype == (p / q).dtype
    assert as_torch(x + 1).dtype == (p + 1).dtype
    assert as_torch(x * 2.5).dtype == (p * 2.5).dtype


def test_dropout_keeps_the_mean_and_follows_the_seed() -> None:
    x = mt.ones(100, 100, requires_grad=True)
    out = mt.dropout(x, 0.25)
    assert abs(out.mean().item() - 1) < 0.02
    kept = out.detach() != 0
    out.sum().backward()
    assert ((x.grad != 0) == kept).all().item()
    mt.manual_seed(0)
    assert (mt.dropout(x, 0.25) == out).all().item()
    assert mt.dropout(x, 0.25, False) is x
