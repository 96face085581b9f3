"""The segmented linear of the reference: one result for every degree, and the gradients of the formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mainspring import ops
from mainspring.errors import BackendError
from mainspring.ops.policy import Policy

REFERENCE = Policy(backend="reference")


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("degree", [1, 2, 4, 8])
def test_every_degree_gives_the_same_bits(dtype: torch.dtype, degree: int) -> None:
    x, weight, bias = (
        _random(21, 104, dtype=dtype),
        _random(9, 104, seed=1, dtype=dtype),
        _random(9, seed=2, dtype=dtype),
    )
    expected = ops.linear_tp_invariant(x, weight, bias, policy=REFERENCE)
    partials = [
        ops.linear_tp_partial(a, b, degree=degree, policy=REFERENCE)
        for a, b in zip(x.chunk(degree, 1), weight.chunk(degree, 1), strict=True)
    ]
    assert all(p.dtype is torch.float32 for p in partials)
    assert torch.equal(ops.join_tp_partials(partials, bias, dtype), expected)
    torch.testing.assert_close(expected, F.linear(x, weight, bias), atol=0.2, rtol=0.02)


def test_gradients_are_those_of_finite_differences() -> None:
    x, weight, bias = (
        t.double().requires_grad_() for t in (_random(3, 16), _random(5, 16, seed=1), _random(5, seed=2))
    )
    assert torch.autograd.gradcheck(
        lambda x, w, b: ops.linear_tp_invariant(x, w, b, policy=REFERENCE), (x, weight, bias)
    )


def test_bad_input_is_refused() -> None:
    x, weight = _random(2, 24), _random(3, 24)
    with pytest.raises(BackendError, match="not 3"):
        ops.linear_tp_invariant(x, weight, segments=3)
    with pytest.raises(BackendError, match="K = 20"):
        ops.linear_tp_invariant(x[:, :20], weight[:, :20])
    with pytest.raises(BackendError, match="degree 3"):
        ops.linear_tp_partial(x, weight, degree=3)
    with pytest.raises(BackendError, match="power of two, not 3"):
        ops.join_tp_partials([torch.zeros(1, 1)] * 3)
