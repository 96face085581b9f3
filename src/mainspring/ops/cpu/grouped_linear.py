"""One matrix product per expert over rows sorted by expert (csrc/kernels/linear.cpp)."""

from __future__ import annotations

import torch

from mainspring.ops.checks import reject
from mainspring.ops.cpu.extension import dtype_code, require_kernels


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Row r of expert e (offsets[e] <= r < offsets[e + 1]) times weight[e]; the bits are those of `linear`.

    Args:
        x: [R, K] float32 or bfloat16, rows sorted by expert, last dimension contiguous.
        weight: [E, N, K] in x's dtype, contiguous.
        offsets: [E + 1] int32 on the CPU, from 0 to R, non-decreasing.

    Returns:
        [R, N] in x's dtype.

    Raises:
        BackendError: a device, dtype, shape or layout that the kernel does not take.
    """
    code = dtype_code("grouped_linear", x)
    r, k = x.shape
    num_experts, n, weight_k = weight.shape
    if weight.dtype is not x.dtype or weight_k != k or not weight.is_contiguous():
        raise reject(
            "grouped_linear",
            f"weight must be a contiguous [E, N, {k}] of {x.dtype}, not {tuple(weight.shape)} of {weight.dtype}",
        )
    if x.stride(1) != 1 and k > 1:
        raise reject("grouped_linear", "the last dimension of x must be contiguous; call .contiguous()")
    if offsets.dtype is not torch.int32 or offsets.shape != (num_experts + 1,) or not offsets.is_contiguous():
        raise reject(
            "grouped_linear",
            f"offsets must be [{num_experts + 1}] int32, not {tuple(offsets.shape)} of {offsets.dtype}",
        )
    if int(offsets[0]) != 0 or int(offsets[-1]) != r or not bool((offsets[1:] >= offsets[:-1]).all()):
        raise reject(
            "grouped_linear", f"offsets must rise from 0 to the {r} rows of x; got {offsets.tolist()}"
        )
    out = torch.empty((r, n), dtype=x.dtype)
    require_kernels().grouped_linear(
        x.data_ptr(),
        x.stride(0),
        weight.data_ptr(),
        offsets.data_ptr(),
        out.data_ptr(),
        num_experts,
        n,
        k,
        code,
    )
    return out
