"""The CPU matrix product: as exact as torch's, and each row's bits its own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mainspring.errors import BackendError
from mainspring.ops.cpu.grouped_linear import grouped_linear
from mainspring.ops.cpu.linear import linear
from support.cpu_kernels import (
    DTYPES,
    assert_as_exact_as_torch,
    assert_same_bits,
    random_tensor,
    requires_kernels,
    threads,
)
from support.memory import in_poisoned_memory

pytestmark = [requires_kernels, in_poisoned_memory]

seeds = st.integers(0, 2**31)
dtypes = st.sampled_from(DTYPES)


@settings(deadline=None, max_examples=60)
@given(
    seeds, st.integers(0, 40), st.integers(1, 70), st.integers(1, 200), dtypes, st.booleans(), st.booleans()
)
def test_is_as_exact_as_torch(
    seed: int, m: int, n: int, k: int, dtype: torch.dtype, with_bias: bool, wide_out: bool
) -> None:
    x, w = random_tensor(seed, m, k, dtype=dtype), random_tensor(seed + 1, n, k, dtype=dtype)
    bias = random_tensor(seed + 2, n, dtype=dtype) if with_bias else None
    out = linear(x, w, bias, torch.float32 if wide_out else None)
    exact = F.linear(x.double(), w.double(), None if bias is None else bias.double())
    peer = (
        F.linear(x.float(), w.float(), None if bias is None else bias.float())
        if wide_out
        else F.linear(x, w, bias)
    )
    assert out.dtype == (torch.float32 if wide_out else dtype)
    magnitude = max((x.double().abs() @ w.double().abs().t()).flatten().tolist(), default=0.0)
    assert_as_exact_as_torch(out, peer, exact, magnitude=magnitude)


@settings(deadline=None, max_examples=30)
@given(seeds, st.integers(1, 150), st.integers(1, 100), st.integers(1, 700), dtypes, st.data())
def test_a_row_has_the_same_bits_in_every_batch(
    seed: int, m: int, n: int, k: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    x, w = random_tensor(seed, m, k, dtype=dtype), random_tensor(seed + 1, n, k, dtype=dtype)
    whole = linear(x, w)
    begin = data.draw(st.integers(0, m - 1))
    end = data.draw(st.integers(begin + 1, m))
    assert_same_bits(linear(x[begin:end], w), whole[begin:end])
    assert_same_bits(linear(x.flip(0), w).flip(0), whole)
    for row in {0, begin, m - 1}:
        assert_same_bits(linear(x[row : row + 1], w), whole[row : row + 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 2100, 576), (7, 900, 333), (300, 260, 1025)])
def test_bits_do_not_depend_on_threads(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    x, w = random_tensor(0, m, k, dtype=dtype), random_tensor(1, n, k, dtype=dtype)
    with threads(1):
        alone = linear(x, w)
    for count in (2, 3, 5):
        with threads(count):
            assert_same_bits(linear(x, w), alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns_have_the_same_bits_in_every_slice_of_the_weight(dtype: torch.dtype) -> None:
    """A column-parallel rank holds some of the rows of w: its outputs are those of the whole."""
    x, w = random_tensor(0, 9, 131, dtype=dtype), random_tensor(1, 61, 131, dtype=dtype)
    whole = linear(x, w)
    for begin, end in ((0, 1), (1, 30), (30, 61), (57, 59)):
        assert_same_bits(linear(x, w[begin:end]), whole[:, begin:end].contiguous())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_takes_strided_rows_and_leading_dimensions(dtype: torch.dtype) -> None:
    wide, w = random_tensor(0, 6, 100, dtype=dtype), random_tensor(1, 20, 130, dtype=dtype)
    assert_same_bits(
        linear(wide[:, 10:50], w[:, 3:43]), linear(wide[:, 10:50].contiguous(), w[:, 3:43].contiguous())
    )
    assert_same_bits(linear(wide.view(2, 3, 100), w[:, :100]).view(6, 20), linear(wide, w[:, :100]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_broken_row_stays_alone(dtype: torch.dtype) -> None:
    x, w = random_tensor(0, 10, 70, dtype=dtype), random_tensor(1, 33, 70, dtype=dtype)
    expected = linear(x, w)
    x[4, 3], x[7, 69] = float("nan"), float("inf")
    got = linear(x, w)
    assert got[4].isnan().all()
    assert not got[7].isfinite().any()
    keep = [i for i in range(10) if i not in (4, 7)]
    assert_same_bits(got[keep], expected[keep])


@settings(deadline=None, max_examples=30)
@given(
    seeds,
    st.lists(st.integers(0, 20), min_size=1, max_size=6),
    st.integers(1, 50),
    st.integers(1, 90),
    dtypes,
)
def test_grouped_rows_have_the_bits_of_linear(
    seed: int, counts: list[int], n: int, k: int, dtype: torch.dtype
) -> None:
    x = random_tensor(seed, sum(counts), k, dtype=dtype)
    weight = random_tensor(seed + 1, len(counts), n, k, dtype=dtype)
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    pieces = [linear(rows, w) for rows, w in zip(x.split(counts), weight, strict=True)]
    assert_same_bits(grouped_linear(x, weight, offsets), torch.cat(pieces))


def test_refuses_what_it_cannot_read() -> None:
    x, w = torch.zeros(2, 8), torch.zeros(4, 8)
    with pytest.raises(BackendError, match="float32 and bfloat16"):
        linear(x.half(), w.half())
    with pytest.raises(BackendError, match="does not fit"):
        linear(x, w[:, :7])
    with pytest.raises(BackendError, match="does not fit"):
        linear(x, w.bfloat16())
    with pytest.raises(BackendError, match="on meta"):
        linear(x, w.to("meta"))
    with pytest.raises(BackendError, match="contiguous"):
        linear(x, torch.zeros(8, 4).t())
    with pytest.raises(BackendError, match="bias"):
        linear(x, w, torch.zeros(3))
    with pytest.raises(BackendError, match="out_dtype"):
        linear(x, w, out_dtype=torch.bfloat16)
    for offsets in ([0, 1, 3], [0, 2, 1], [1, 2, 2], [0, 2]):
        with pytest.raises(BackendError, match="offsets"):
            grouped_linear(x, torch.zeros(2, 4, 8), torch.tensor(offsets, dtype=torch.int32))
