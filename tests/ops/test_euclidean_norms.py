"""Norms for clipping are exact however large a tensor is."""

from __future__ import annotations

import pytest
import torch

from mainspring.ops.euclidean_norms import euclidean_norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_large_tensors_norm_is_as_exact_as_a_small_ones(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(3_000_000, generator=generator).mul_(1e-3).to(dtype),
        torch.randn(7, 5, generator=generator).to(dtype).t(),
        torch.zeros(4, dtype=dtype),
    ]
    found = euclidean_norms(tensors)
    assert found.dtype is torch.float64
    expected = torch.stack([tensor.double().norm() for tensor in tensors])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_no_tensors_have_no_norms_and_infinity_stays() -> None:
    assert euclidean_norms([]).shape == (0,)
    assert euclidean_norms([torch.tensor([1.0, float("inf")])]).isinf().all()
    assert euclidean_norms([torch.tensor([1.0, float("nan")])]).isnan().all()
