"""Products whose order is free, on a GPU: whoever serves them, they are as exact as those in canonical order."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mainspring import ops
from mainspring.ops.policy import FAST
from support.triton_kernels import AVAILABLE, INTERPRETED, random_tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not AVAILABLE or INTERPRETED, reason="cuBLAS and the kernels beside it run on a GPU"),
]


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("n", "k"), [(4096, 1024), (24576, 512), (1000, 2104)])
def test_free_order_is_as_exact_as_the_canonical_one(
    n: int, k: int, with_bias: bool, out_dtype: torch.dtype
) -> None:
    """Wide results too: logits are not rounded to the weights' dtype on their way."""
    weight = random_tensor(1, n, k, dtype=torch.bfloat16, scale=0.05)
    bias = random_tensor(2, n, dtype=torch.bfloat16) if with_bias else None
    x = random_tensor(0, 3000, k, dtype=torch.bfloat16)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    for m in (1, 256, 257, 400, 640, 1100, 3000):
        errors = [
            (ops.linear(x[:m], weight, bias, out_dtype=out_dtype, policy=policy).double() - exact[:m])
            .abs()
            .max()
            for policy in (FAST, ops.Policy())
        ]
        assert errors[0] <= 2 * errors[1]
