"""Rotary position embedding: the angles once a forward pass, the rotation (with negated sines its own inverse, which is
its gradient)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mainspring.ops.triton.support import check_dtype, on_device, require


@triton.jit(do_not_specialize=["size"])
def rope_angles_kernel(
    positions, inv_freq, cos, sin, size, SCALE: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr
):
    """An fp32 product, its functions in fp64, rounded once: no approximation that a GPU's fp32 sine makes."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    position = tl.load(positions + index // HALF, inside, 0).to(tl.float32)
    angle = (position * tl.load(inv_freq + index % HALF, inside, 0.0)).to(tl.float64)
    scale = tl.full((BLOCK,), SCALE, tl.float64)
    tl.store(cos + index, (tl.cos(angle) * scale).to(tl.float32), inside)
    tl.store(sin + index, (tl.sin(angle) * scale).to(tl.float32), inside)


@triton.jit
def _rotate(
    x, out, stride, out_stride, token, cos, sin, halves, HEADS: tl.constexpr, PADDED: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    heads = tl.arange(0, PADDED)
    inside = (heads < HEADS)[:, None] & (halves < HALF)[None, :]
    offsets = heads[:, None] * (2 * HALF) + halves[None, :]
    first = tl.load(x + token * stride + offsets, inside, 0.0).to(tl.float32)
    second = tl.load(x + token * stride + HALF + offsets, inside, 0.0).to(tl.float32)
    # Explicit fused multiply-adds, so that no compiler chooses which of the two products is fused.
    turned_first = tl.fma(-second, sin, first * cos)
    turned_second = tl.fma(first, sin, second * cos)
    target = out + token * out_stride + offsets
    tl.store(target, turned_first.to(out.dtype.element_ty), inside)
    tl.store(target + HALF, turned_second.to(out.dtype.element_ty), inside)


@triton.jit
def rope_kernel(
    q, k, q_out, k_out, cos, sin, q_stride, k_stride, q_out_stride, k_out_stride,
    Q_HEADS: tl.constexpr, Q_PADDED: tl.constexpr, K_HEADS: tl.constexpr, K_PADDED: tl.constexpr,
    HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (tokens,). A head is (first half, second half)."""
    token = tl.program_id(0).to(tl.int64)
    halves = tl.arange(0, BLOCK)
    c = tl.load(cos + token * HALF + halves, halves < HALF, 0.0)[None, :]
    s = tl.load(sin + token * HALF + halves, halves < HALF, 0.0)[None, :]
    _rotate(q, q_out, q_stride, q_out_stride, token, c, s, halves, Q_HEADS, Q_PADDED, HALF)
    _rotate(k, k_out, k_stride, k_out_stride, token, c, s, halves, K_HEADS, K_PADDED, HALF)


def rope_angles(positions: Tensor, inv_freq: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine of `float32(position) * inv_freq`, rounded to fp32 from fp64, times `scale`.

    Args:
        positions: [T] int64.
        inv_freq: [D / 2] float32.
        scale: attention scaling of the RoPE variant (YaRN), 1 otherwise.

    Returns:
        (cos, sin), each [T, D / 2] float32.

    Raises:
        BackendError: a dtype or shape that the kernel does not take.
    """
    require(
        "rope_angles",
        positions.dim() == 1 and not positions.is_floating_point(),
        f"positions must be [T] integers, not {tuple(positions.shape)} of {positions.dtype}",
    )
    require(
        "rope_angles",
        inv_freq.dtype is torch.float32 and inv_freq.dim() == 1,
        f"inv_freq must be [D / 2] float32, not {tuple(inv_freq.shape)} of {inv_freq.dtype}",
    )
    half = inv_freq.shape[0]
    shape = (positions.shape[0], half)
    cos = torch.empty(shape, dtype=torch.float32, device=inv_freq.device)
    sin = torch.empty(shape, dtype=torch.float32, device=inv_freq.device)
    if cos.numel():
        block = 256
        with on_device(cos):
            rope_angles_kernel[(triton.cdiv(cos.numel(), block),)](
                positions.contiguous(), inv_freq.contiguous(), cos, sin, cos.numel(), SCALE=float(scale),
                HALF=half, BLOCK=block,
            )  # fmt: skip
    return cos, sin


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, in_place: bool = False) -> tuple[Tensor, Tensor]:
    """Rotates queries and keys: halves (x1, x2) become (x1 cos - x2 sin, x2 cos + x1 sin).

    Args:
        q: [T, Hq, D] float32, bfloat16 or float16; tokens may be strided, a token's heads are contiguous.
        k: [T, Hkv, D] likewise, in q's dtype.
        cos: [T, D / 2] float32.
        sin: [T, D / 2] float32.
        in_place: overwrite q and k (where a token's heads are contiguous) and return them.

    Returns:
        The rotated (q, k).

    Raises:
        BackendError: a dtype or shape that the kernel does not take.
    """
    check_dtype("rope", q)
    tokens, q_heads, d = q.shape
    require(
        "rope",
        k.dtype is q.dtype and k.dim() == 3 and k.shape[0] == tokens and k.shape[2] == d and d % 2 == 0,
        f"k {k.dtype} {tuple(k.shape)} does not fit q {q.dtype} {tuple(q.shape)}, whose head size must be even",
    )
    require(
        "rope",
        cos.shape == sin.shape == (tokens, d // 2) and cos.dtype is sin.dtype is torch.float32,
        f"cos and sin must be [{tokens}, {d // 2}] float32, not {tuple(cos.shape)} of {cos.dtype}",
    )
    q, k = (x if x.stride()[1:] == (d, 1) else x.contiguous() for x in (q, k))
    q_out = q if in_place else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = k if in_place else torch.empty(k.shape, dtype=k.dtype, device=k.device)
    k_heads = k.shape[1]
    if tokens and d:
        with on_device(q):
            rope_kernel[(tokens,)](
                q, k, q_out, k_out, cos.contiguous(), sin.contiguous(), q.stride(0), k.stride(0), q_out.stride(0),
                k_out.stride(0), Q_HEADS=q_heads, Q_PADDED=triton.next_power_of_2(q_heads), K_HEADS=k_heads,
                K_PADDED=triton.next_power_of_2(k_heads), HALF=d // 2, BLOCK=triton.next_power_of_2(d // 2),
            )  # fmt: skip
    return q_out, k_out
