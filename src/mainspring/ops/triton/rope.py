"""Rotary position embedding from inverse frequencies: sines and cosines are computed as they are used, without a table.

Its gradient is the rotation back, the same kernel with the sines' signs turned.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mainspring.ops.triton.support import check_dtype, on_device, require

# pi / 2 in three parts of 24 bits each, and the coefficients of sine and cosine in [-pi/4, pi/4] (minimax fits).
_TWO_OVER_PI = tl.constexpr(0.6366197723675814)
_PI_1 = tl.constexpr(1.57079637050628662109375)
_PI_2 = tl.constexpr(-4.37113900018624283e-8)
_PI_3 = tl.constexpr(-1.71512451000588188e-15)
_ROUNDER = tl.constexpr(12582912.0)  # 1.5 · 2^23: a sum with it is rounded to an integer


@triton.jit
def sine_cosine(angle):
    """(sin, cos) in fp32 of an fp32 angle, within 2 units in the last place up to 4 million radians.

    Cody-Waite reduction in explicit fused multiply-adds: the first difference is exact, for its terms are multiples
    of 2^-23 and it is below 1. The same instructions wherever it is called from, so the same bits.
    """
    shifted = tl.fma(angle, _TWO_OVER_PI, _ROUNDER)
    quarter = shifted.to(tl.int32, bitcast=True)
    turns = shifted - _ROUNDER
    r = tl.fma(-turns, _PI_1, angle)
    r = tl.fma(-turns, _PI_2, r)
    r = tl.fma(-turns, _PI_3, r)
    square = r * r
    odd = tl.fma(square, 2.7152796e-6, -1.9839007e-4)
    odd = tl.fma(tl.fma(odd, square, 8.333328e-3), square, -0.16666667)
    sine = tl.fma(r * square, odd, r)
    even = tl.fma(tl.fma(square, 2.4409044e-5, -1.388711e-3), square, 4.166664e-2)
    cosine = tl.fma(square, tl.fma(square, even, -0.5), 1.0)
    swapped = (quarter & 1) != 0
    a = tl.where(swapped, cosine, sine)
    b = tl.where(swapped, sine, cosine)
    return tl.where((quarter & 2) != 0, -a, a), tl.where(((quarter + 1) & 2) != 0, -b, b)


@triton.jit
def token_rotation(
    positions, rows, inv_freq, token, pairs, scale, HALF: tl.constexpr, ROWS: tl.constexpr, INVERSE: tl.constexpr
):  # fmt: skip
    """(cos, sin), each [1, pairs], of a token's angles float32(position) · inv_freq, times scale."""
    position = tl.load(positions + token).to(tl.float32)
    if ROWS:
        inv_freq += tl.load(rows + token).to(tl.int64) * HALF
    frequency = tl.load(inv_freq + pairs, pairs < HALF, 0.0)
    sine, cosine = sine_cosine(position * frequency)
    if INVERSE:
        sine = -sine
    return (cosine * scale)[None, :], (sine * scale)[None, :]


@triton.jit
def turned(first, second, cos, sin):
    # Explicit fused multiply-adds, so that no compiler chooses which of the two products is fused.
    return tl.fma(-second, sin, first * cos), tl.fma(first, sin, second * cos)


@triton.jit
def load_pairs(
    source, pairs, HEADS: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """(first, second), each [PADDED, pairs] fp32, of the pairs of a token's heads."""
    heads = tl.arange(0, PADDED)
    if INTERLEAVED:
        columns = tl.arange(0, 2 * pairs.shape[0])
        inside = (heads < HEADS)[:, None] & (columns < 2 * HALF)[None, :]
        both = tl.load(source + heads[:, None] * DIM + columns[None, :], inside, 0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(both, (PADDED, pairs.shape[0], 2)))
    else:
        inside = (heads < HEADS)[:, None] & (pairs < HALF)[None, :]
        offsets = heads[:, None] * DIM + pairs[None, :]
        first = tl.load(source + offsets, inside, 0.0).to(tl.float32)
        second = tl.load(source + HALF + offsets, inside, 0.0).to(tl.float32)
    return first, second


@triton.jit
def store_pairs(
    target, first, second, pairs, HEADS: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    heads = tl.arange(0, PADDED)
    if INTERLEAVED:
        columns = tl.arange(0, 2 * pairs.shape[0])
        inside = (heads < HEADS)[:, None] & (columns < 2 * HALF)[None, :]
        both = tl.reshape(tl.join(first, second), (PADDED, 2 * pairs.shape[0]))
        tl.store(target + heads[:, None] * DIM + columns[None, :], both, inside)
    else:
        inside = (heads < HEADS)[:, None] & (pairs < HALF)[None, :]
        offsets = heads[:, None] * DIM + pairs[None, :]
        tl.store(target + offsets, first, inside)
        tl.store(target + HALF + offsets, second, inside)


@triton.jit
def rotate_heads(
    source, target, cos, sin, pairs, HEADS: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    REST: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """A token's heads from source to target, which may be the same place."""
    first, second = load_pairs(source, pairs, HEADS, PADDED, DIM, HALF, INTERLEAVED)
    a, b = turned(first, second, cos, sin)
    dtype: tl.constexpr = target.dtype.element_ty
    store_pairs(target, a.to(dtype), b.to(dtype), pairs, HEADS, PADDED, DIM, HALF, INTERLEAVED)
    if REST > 0:  # what is not rotated, copied
        heads, columns = tl.arange(0, PADDED), tl.arange(0, REST)
        inside = (heads < HEADS)[:, None] & (columns < DIM - 2 * HALF)[None, :]
        offsets = heads[:, None] * DIM + 2 * HALF + columns[None, :]
        tl.store(target + offsets, tl.load(source + offsets, inside, 0.0), inside)


@triton.jit(do_not_specialize=["scale"])
def rope_kernel(
    q, k, q_out, k_out, positions, rows, inv_freq, scale, q_stride, k_stride, q_out_stride, k_out_stride,
    Q_HEADS: tl.constexpr, Q_PADDED: tl.constexpr, K_HEADS: tl.constexpr, K_PADDED: tl.constexpr, DIM: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
):  # fmt: skip
    """Grid: (tokens,)."""
    token = tl.program_id(0).to(tl.int64)
    pairs = tl.arange(0, BLOCK)
    c, s = token_rotation(positions, rows, inv_freq, token, pairs, scale, HALF, ROWS, INVERSE)
    rotate_heads(
        q + token * q_stride, q_out + token * q_out_stride, c, s, pairs, Q_HEADS, Q_PADDED, DIM, HALF, REST, INTERLEAVED
    )  # fmt: skip
    rotate_heads(
        k + token * k_stride, k_out + token * k_out_stride, c, s, pairs, K_HEADS, K_PADDED, DIM, HALF, REST, INTERLEAVED
    )  # fmt: skip


def rope(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    rows: Tensor | None = None,
    scale: float = 1.0,
    *,
    interleaved: bool = False,
    inverse: bool = False,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotates the first R of D elements of queries and keys by the angles position · frequency.

    A pair (x1, x2) becomes (x1 cos - x2 sin, x2 cos + x1 sin) · scale; pairs are (i, i + R / 2), or (2 i, 2 i + 1).

    Args:
        q: [T, Hq, D] float32, bfloat16 or float16; tokens may be strided, a token's heads are contiguous.
        k: [T, Hkv, D] likewise, in q's dtype.
        positions: [T] int64, below 4 million.
        inv_freq: [R / 2] float32, R <= D; or [N, R / 2] with `rows`.
        rows: [T] integers: which row of inv_freq is a token's.
        scale: attention scaling of the RoPE variant (YaRN), 1 otherwise.
        interleaved: pairs are neighbours.
        inverse: rotate back (the gradient).
        in_place: overwrite q and k (where a token's heads are contiguous) and return them.

    Returns:
        The rotated (q, k).

    Raises:
        BackendError: a dtype or shape that the kernel does not take.
    """
    check_rotation("rope", q, k, positions, inv_freq, rows)
    tokens, q_heads, d = q.shape
    q, k = (x if x.stride()[1:] == (d, 1) else x.contiguous() for x in (q, k))
    q_out = q if in_place else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = k if in_place else torch.empty(k.shape, dtype=k.dtype, device=k.device)
    half, k_heads = inv_freq.shape[-1], k.shape[1]
    if tokens and half:
        rest = d - 2 * half
        with on_device(q):
            rope_kernel[(tokens,)](
                q, k, q_out, k_out, positions.contiguous(), positions if rows is None else rows.contiguous(),
                inv_freq.contiguous(), float(scale), q.stride(0), k.stride(0), q_out.stride(0), k_out.stride(0),
                Q_HEADS=q_heads, Q_PADDED=triton.next_power_of_2(q_heads), K_HEADS=k_heads,
                K_PADDED=triton.next_power_of_2(k_heads), DIM=d, HALF=half,
                REST=0 if in_place or not rest else triton.next_power_of_2(rest),
                BLOCK=triton.next_power_of_2(half), ROWS=rows is not None, INTERLEAVED=interleaved, INVERSE=inverse,
            )  # fmt: skip
    elif tokens and not in_place:
        q_out.copy_(q)
        k_out.copy_(k)
    return q_out, k_out


def check_rotation(
    name: str, q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor, rows: Tensor | None
) -> None:
    """Raises BackendError unless the tensors fit each other as `rope` says."""
    check_dtype(name, q)
    require(name, q.dim() == 3, f"q must be [T, Hq, D], not {tuple(q.shape)}")
    tokens, _, d = q.shape
    require(
        name,
        k.dtype is q.dtype and k.dim() == 3 and k.shape[0] == tokens and k.shape[2] == d,
        f"k {k.dtype} {tuple(k.shape)} does not fit q {q.dtype} {tuple(q.shape)}",
    )
    require(
        name,
        positions.shape == (tokens,) and not positions.is_floating_point(),
        f"positions must be [{tokens}] integers, not {tuple(positions.shape)} of {positions.dtype}",
    )
    require(
        name,
        inv_freq.dtype is torch.float32 and inv_freq.dim() == (1 if rows is None else 2),
        f"inv_freq must be [R / 2] float32 (with rows [N, R / 2]), not {tuple(inv_freq.shape)} of {inv_freq.dtype}",
    )
    require(
        name,
        2 * inv_freq.shape[-1] <= d,
        f"{inv_freq.shape[-1]} frequencies rotate {2 * inv_freq.shape[-1]} elements; a head has {d}",
    )
    require(
        name,
        rows is None or (rows.shape == (tokens,) and not rows.is_floating_point()),
        f"rows must be [{tokens}] integers",
    )
