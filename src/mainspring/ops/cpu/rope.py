"""Rotary position embedding: the angles once a forward pass, the rotation in place (csrc/kernels/rope*.cpp)."""

from __future__ import annotations

import torch

from mainspring.ops.checks import reject
from mainspring.ops.cpu.extension import dtype_code, require_kernels


def rope_angles(
    positions: torch.Tensor, inv_freq: torch.Tensor, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of `float32(position) * inv_freq`, correctly rounded to fp32, times `scale`.

    Args:
        positions: [T] int64, contiguous, on the CPU.
        inv_freq: [D / 2] float32, contiguous, on the CPU.
        scale: attention scaling of the RoPE variant (YaRN), 1 otherwise.

    Returns:
        (cos, sin), each [T, D / 2] float32.

    Raises:
        BackendError: a dtype or layout that the kernel does not take.
    """
    if positions.dtype is not torch.int64 or positions.dim() != 1 or not positions.is_contiguous():
        raise reject(
            "rope_angles", f"positions must be [T] int64, not {tuple(positions.shape)} of {positions.dtype}"
        )
    if inv_freq.dtype is not torch.float32 or inv_freq.dim() != 1 or not inv_freq.is_contiguous():
        raise reject(
            "rope_angles",
            f"inv_freq must be [D / 2] float32, not {tuple(inv_freq.shape)} of {inv_freq.dtype}",
        )
    if not (positions.is_cpu and inv_freq.is_cpu):
        raise reject(
            "rope_angles",
            f"positions are on {positions.device}, inv_freq on {inv_freq.device}, not on the CPU",
        )
    t, half = positions.shape[0], inv_freq.shape[0]
    cos = torch.empty((t, half), dtype=torch.float32)
    sin = torch.empty((t, half), dtype=torch.float32)
    require_kernels().rope_angles(
        positions.data_ptr(), inv_freq.data_ptr(), cos.data_ptr(), sin.data_ptr(), t, half, scale
    )
    return cos, sin


def rope_(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotates queries and keys in place: halves (x1, x2) become (x1 cos - x2 sin, x2 cos + x1 sin).

    Args:
        q: [T, Hq, D] float32 or bfloat16; tokens may be strided, a token's heads are contiguous.
        k: [T, Hkv, D] likewise, in q's dtype.
        cos: [T, D / 2] float32, contiguous.
        sin: [T, D / 2] float32, contiguous.

    Raises:
        BackendError: a device, dtype, shape or layout that the kernel does not take.
    """
    code = dtype_code("rope", q)
    t, q_heads, d = q.shape
    k_t, k_heads, k_d = k.shape
    q_stride, k_stride = q.stride(), k.stride()
    if k.dtype is not q.dtype or k_t != t or k_d != d:
        raise reject("rope", f"k {k.dtype} {tuple(k.shape)} does not fit q {q.dtype} {tuple(q.shape)}")
    if q_stride[1:] != (d, 1) or k_stride[1:] != (d, 1):
        raise reject("rope", f"a token's heads must be contiguous; strides are {q_stride} and {k_stride}")
    if cos.shape != (t, d // 2) or cos.shape != sin.shape or cos.dtype is not torch.float32 or d % 2:
        raise reject(
            "rope", f"cos and sin must be [{t}, {d // 2}] float32, not {tuple(cos.shape)} of {cos.dtype}"
        )
    if sin.dtype is not torch.float32 or not cos.is_contiguous() or not sin.is_contiguous():
        raise reject("rope", "cos and sin must be contiguous float32")
    require_kernels().rope(
        q.data_ptr(), k.data_ptr(), q_stride[0], k_stride[0], cos.data_ptr(), sin.data_ptr(), t, q_heads, k_heads,
        d // 2, code,
    )  # fmt: skip
