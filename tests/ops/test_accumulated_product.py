"""A product added to a sum: the formula, whatever the sum's dtype and whatever it held before."""

from __future__ import annotations

import pytest
import torch

from mainspring.ops.accumulated_product import accumulate_product

CPU = torch.device("cpu")
GPU = pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_products_add_up_to_the_formula(dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    wide = torch.float32 if dtype is torch.bfloat16 else dtype
    total = torch.full((48, 32), torch.nan, dtype=wide, device=device)  # must not be read at first
    exact = torch.zeros(48, 32, dtype=torch.float64, device=device)
    size = 0.0
    for number in range(3):
        # The first is transposed, as gradients are.
        grad, x = (torch.randn(64, n, device=device).to(dtype).requires_grad_() for n in (48, 32))
        accumulate_product(total, grad.t(), x, add=number > 0)
        term = grad.detach().double().t() @ x.detach().double()
        exact += term
        size += float(term.norm())
    # On CUDA a narrow product is not rounded on its way; the CPU has none that adds to a wider sum.
    narrow = dtype if device.type == "cpu" else wide
    assert float((total.double() - exact).norm()) <= 4 * torch.finfo(narrow).eps * size
    assert not total.requires_grad
