"""A product of matrices that is added to a sum which may be wider than they are: gradients over micro-batches.

On CUDA the GEMM does it as it writes: the product is not rounded on its way, nor written and read again.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def accumulate_product(total: Tensor, a: Tensor, b: Tensor, *, add: bool = True) -> None:
    """total += a b, or total = a b without `add`, when total may hold anything.

    a: [M, K], b: [K, N], of one dtype; total: [M, N], of that dtype or float32.
    """
    if total.dtype is b.dtype:
        if add:
            total.addmm_(a, b)
        else:
            torch.mm(a, b, out=total)
    elif b.is_cuda:
        if add:
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
        else:
            torch.mm(a, b, out_dtype=total.dtype, out=total)
    elif add:
        total.add_(a @ b)
    else:
        total.copy_(a @ b)
