"""SwiGLU on the fused gate and up projection (csrc/kernels/swiglu.cpp)."""

from __future__ import annotations

import torch

from mainspring.ops.checks import reject
from mainspring.ops.cpu.extension import dtype_code, require_kernels


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` where a row is (gate, up), in fp32, rounded once.

    Args:
        gate_up: [M, 2 I] float32 or bfloat16, last dimension contiguous.

    Returns:
        [M, I], contiguous.

    Raises:
        BackendError: a device, dtype, shape or layout that the kernel does not take.
    """
    code = dtype_code("swiglu", gate_up)
    if gate_up.dim() != 2:
        raise reject("swiglu", f"gate_up must be [M, 2 I], not {tuple(gate_up.shape)}")
    m, two_i = gate_up.shape
    stride, step = gate_up.stride()
    if two_i % 2 or (step != 1 and two_i > 1):
        raise reject("swiglu", f"gate_up must be [M, 2 I] with contiguous rows, not {tuple(gate_up.shape)}")
    out = gate_up.new_empty((m, two_i // 2))
    require_kernels().swiglu(gate_up.data_ptr(), stride, out.data_ptr(), m, two_i // 2, code)
    return out
