"""Triton's linear: as exact as torch's, and each row's bits its own, whatever M and the tile are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mainspring.errors import BackendError
from support.cpu_kernels import assert_as_exact_as_torch
from support.memory import in_poisoned_memory
from support.triton_kernels import (
    DEVICE,
    DTYPES,
    EXAMPLES,
    INTERPRETED,
    assert_same_bits,
    needs_triton,
    random_tensor,
)

pytestmark = [*needs_triton, in_poisoned_memory]

dtypes = st.sampled_from(DTYPES)
sizes = st.sampled_from(
    [1, 2, 15, 16, 17, 64, 70, 129] if INTERPRETED else [1, 2, 15, 16, 63, 64, 65, 300, 1000]
)
depths = st.sampled_from([1, 8, 48, 80, 2100] if INTERPRETED else [1, 8, 48, 80, 1000, 2100, 4096])


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    dtype=dtypes, m=sizes, n=sizes, k=depths, bias=st.booleans(), wide=st.booleans(), seed=st.integers(0, 99)
)
def test_as_exact_as_torch(
    dtype: torch.dtype, m: int, n: int, k: int, bias: bool, wide: bool, seed: int
) -> None:
    from mainspring.ops.triton.linear import linear

    x, w = random_tensor(seed, m, k, dtype=dtype), random_tensor(seed + 1, n, k, dtype=dtype)
    b = random_tensor(seed + 2, n, dtype=dtype) if bias else None
    got = linear(x, w, b, torch.float32 if wide else None)
    exact = F.linear(x.double(), w.double(), None if b is None else b.double())
    peer = F.linear(x, w, b)
    assert got.dtype == (torch.float32 if wide else dtype)
    # k roundings of a float32 sum beside torch's own error, which may be zero by luck
    assert_as_exact_as_torch(got, peer, exact, roundings=1 + k**0.5 if got.dtype is torch.float32 else 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(97, 48), (64, 2100), (24, 3000)])
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype, n: int, k: int) -> None:
    from mainspring.ops.triton.linear import linear

    largest = 70 if INTERPRETED else 2048
    x, w = random_tensor(0, largest, k, dtype=dtype), random_tensor(1, n, k, dtype=dtype)
    whole = linear(x, w)
    for m in (1, 2, 17, 64) if INTERPRETED else (1, 2, 8, 17, 64, 100, 129, 256, 1000):
        assert_same_bits(linear(x[:m], w), whole[:m])
        assert_same_bits(linear(x[3 : 3 + m], w), whole[3 : 3 + m])


@pytest.mark.skipif(INTERPRETED, reason="too large for the interpreter")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("n", "k"), [(1024, 3072), (4096, 1024), (512, 8192), (6144, 4096)])
def test_a_row_is_the_same_from_1_to_16384_and_in_every_tile(dtype: torch.dtype, n: int, k: int) -> None:
    from mainspring.ops.triton.linear import _CHOICES, linear

    x, w = random_tensor(0, 16384, k, dtype=dtype), random_tensor(1, n, k, dtype=dtype, scale=0.05)
    whole = linear(x, w)
    for m in (1, 16, 33, 64, 128, 250, 512, 1024, 2048, 4096, 8192):
        assert_same_bits(linear(x[:m], w), whole[:m])
    if dtype != torch.float32:
        for choice in _CHOICES:
            assert_same_bits(linear(x[:777], w, tile=choice.tile), whole[:777])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_and_unaligned_rows(dtype: torch.dtype) -> None:
    from mainspring.ops.triton.linear import linear

    wide, w = random_tensor(0, 20, 100, dtype=dtype), random_tensor(1, 40, 64, dtype=dtype)
    for first in (0, 1, 8):
        view = wide[:, first : first + 64]
        assert_same_bits(linear(view, w), linear(view.contiguous(), w))


def test_no_rows() -> None:
    from mainspring.ops.triton.linear import linear

    assert linear(random_tensor(0, 0, 8), random_tensor(1, 5, 8)).shape == (0, 5)


def test_bad_input_is_refused() -> None:
    from mainspring.ops.triton.linear import linear

    x = random_tensor(0, 3, 8)
    with pytest.raises(BackendError, match="does not fit"):
        linear(x, random_tensor(1, 5, 9))
    with pytest.raises(BackendError, match="float64"):
        linear(x.double(), random_tensor(1, 5, 8).double())
    with pytest.raises(BackendError, match="bias"):
        linear(x, random_tensor(1, 5, 8), torch.zeros(4, device=DEVICE))
    with pytest.raises(BackendError, match="out_dtype"):
        linear(x, random_tensor(1, 5, 8), None, torch.float16)
