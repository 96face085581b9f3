"""Matrix product with an unpacked weight (csrc/kernels/linear.cpp)."""

from __future__ import annotations

import torch

from mainspring.ops.checks import reject
from mainspring.ops.cpu.extension import DTYPE_CODES, dtype_code, require_kernels


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`x @ weight.T + bias`, summed in fp32 and rounded once; a row's bits do not depend on the other rows.

    Args:
        x: [..., K] float32 or bfloat16, last dimension contiguous.
        weight: [N, K] in x's dtype, last dimension contiguous.
        bias: [N] in x's dtype, or None.
        out_dtype: x's dtype (None) or float32.

    Returns:
        [..., N], contiguous.

    Raises:
        BackendError: a device, dtype, shape or layout that the kernel does not take.
    """
    shape = x.shape
    if len(shape) != 2:
        x = x.reshape(-1, shape[-1])
    m, k = x.shape
    n, weight_k = weight.shape
    dtype = x.dtype
    code = dtype_code("linear", x)
    if weight.dtype is not dtype or weight_k != k or not weight.is_cpu:
        raise reject(
            "linear",
            f"weight {weight.dtype} {tuple(weight.shape)} on {weight.device} does not fit x {dtype} {tuple(shape)}",
        )
    x_stride, x_step = x.stride()
    weight_stride, weight_step = weight.stride()
    if (x_step != 1 or weight_step != 1) and k > 1:
        raise reject("linear", "the last dimension of x and of weight must be contiguous; call .contiguous()")
    bias_address = 0
    if bias is not None:
        if bias.dtype is not dtype or bias.shape != (n,) or not bias.is_contiguous() or not bias.is_cpu:
            raise reject(
                "linear",
                f"bias must be a contiguous [{n}] of {dtype}, not {tuple(bias.shape)} of {bias.dtype}",
            )
        bias_address = bias.data_ptr()
    if out_dtype is None:
        out_dtype = dtype
    elif out_dtype is not dtype and out_dtype is not torch.float32:
        raise reject("linear", f"out_dtype must be {dtype} or torch.float32, not {out_dtype}")
    out = x.new_empty((m, n)) if out_dtype is dtype else x.new_empty((m, n), dtype=out_dtype)
    require_kernels().linear(
        x.data_ptr(), x_stride, weight.data_ptr(), weight_stride, bias_address, out.data_ptr(), n, m, n, k, code,
        DTYPE_CODES[out_dtype],
    )  # fmt: skip
    return out if len(shape) == 2 else out.view(*shape[:-1], n)
