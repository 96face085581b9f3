"""Triton's segmented linear: one result for every degree of tensor parallelism, every M and every way to compute it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mainspring import ops
from mainspring.errors import BackendError
from mainspring.ops.policy import Policy
from support.cpu_kernels import assert_as_exact_as_torch
from support.memory import in_poisoned_memory
from support.triton_kernels import (
    DTYPES,
    INTERPRETED,
    assert_same_bits,
    needs_triton,
    random_tensor,
)

pytestmark = [*needs_triton, in_poisoned_memory]

TRITON = Policy(backend="triton")
ROWS = (1, 17, 70) if INTERPRETED else (1, 17, 64, 300, 2000)
SHAPES = [(40, 64), (70, 1040)] if INTERPRETED else [(97, 520), (1024, 1024), (512, 4864), (2048, 3072)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_every_degree_gives_the_same_bits(dtype: torch.dtype, n: int, k: int) -> None:
    weight, bias = random_tensor(1, n, k, dtype=dtype), random_tensor(2, n, dtype=dtype)
    for m in ROWS:
        x = random_tensor(0, m, k, dtype=dtype)
        expected = ops.linear_tp_invariant(x, weight, bias, policy=TRITON)
        for degree in (1, 2, 4, 8):
            parts = zip(x.chunk(degree, 1), weight.chunk(degree, 1), strict=True)
            partials = [
                ops.linear_tp_partial(a.contiguous(), b.contiguous(), degree=degree, policy=TRITON)
                for a, b in parts
            ]
            assert_same_bits(ops.join_tp_partials(partials, bias, dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype, n: int, k: int) -> None:
    x, weight = random_tensor(0, ROWS[-1], k, dtype=dtype), random_tensor(1, n, k, dtype=dtype)
    whole = ops.linear_tp_invariant(x, weight, policy=TRITON)
    for m in ROWS:
        assert_same_bits(ops.linear_tp_invariant(x[:m], weight, policy=TRITON), whole[:m])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("segments", [1, 2, 8])
def test_as_exact_as_torch(dtype: torch.dtype, segments: int) -> None:
    x, weight = random_tensor(0, 33, 1032, dtype=dtype), random_tensor(1, 50, 1032, dtype=dtype)
    bias = random_tensor(2, 50, dtype=dtype)
    for m in (1, 33):
        got = ops.linear_tp_invariant(x[:m], weight, bias, segments=segments, policy=TRITON)
        exact = F.linear(x[:m].double(), weight.double(), bias.double())
        roundings = 1 + 1032**0.5 if dtype is torch.float32 else 1
        assert_as_exact_as_torch(got, F.linear(x[:m], weight, bias), exact, roundings=roundings)


def test_bad_input_is_refused() -> None:
    with pytest.raises(BackendError, match="does not fit"):
        ops.linear_tp_invariant(random_tensor(0, 3, 16), random_tensor(1, 5, 24), policy=TRITON)
