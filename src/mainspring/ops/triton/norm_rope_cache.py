"""Norms of the heads of queries and keys, RoPE, and the write of keys and values to a paged cache, in one launch.

The bits are those of `rms_norm` of q and of k, then `rope_write_cache`: rows are summed in tiles of the shape that
`rms_norm` gives them, the rest is element by element in the same instructions. (Stores of float8 may let the compiler
arrange a row over threads otherwise: there the bits may differ.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mainspring.ops.triton.norm import row_shape
from mainspring.ops.triton.rope import check_rotation, token_rotation
from mainspring.ops.triton.rope_cache import check_cache, quantised
from mainspring.ops.triton.support import canonical_rows, has_dependent_launch, on_device, require


@triton.jit
def _weighted(value, scale, factor, DTYPE: tl.constexpr):
    """A normed element, rounded where `rms_norm` rounds, in fp32."""
    normed = (value * scale).to(DTYPE).to(tl.float32)
    return (normed * factor).to(DTYPE).to(tl.float32)


@triton.jit
def normed_rotated(
    source, weight, row, columns, inside, cos, sin, eps, DIM: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    """Heads `row` of a token, [rows, columns] in fp32, rounded to the source's dtype by whoever stores them."""
    dtype: tl.constexpr = source.dtype.element_ty
    value = tl.load(source + row[:, None] * DIM + columns[None, :], inside, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1) / DIM + eps)[:, None]
    own = _weighted(
        value, scale, tl.load(weight + columns, columns < DIM, 0.0).to(tl.float32)[None, :], dtype
    )
    # The other element of each pair is read again: it lies with another thread.
    paired = tl.where(columns < HALF, columns + HALF, columns - HALF)
    value = tl.load(source + row[:, None] * DIM + paired[None, :], inside, 0.0).to(tl.float32)
    other = _weighted(
        value, scale, tl.load(weight + paired, columns < DIM, 0.0).to(tl.float32)[None, :], dtype
    )
    # As in `rope.turned`: (first cos - second sin, second cos + first sin).
    return tl.fma(tl.where((columns < HALF)[None, :], -other, other), sin, own * cos)


@triton.jit
def column_rotation(
    positions, rows, inv_freq, token, columns, rope_scale, HALF: tl.constexpr, ROWED: tl.constexpr
):  # fmt: skip
    """(cos, sin), each [1, columns]: both elements of a pair have its angle."""
    pairs = tl.where(columns < HALF, columns, columns - HALF)
    return token_rotation(positions, rows, inv_freq, token, pairs, rope_scale, HALF, ROWED, False)


@triton.jit
def store_normed_rotated(
    source, weight, target, group, columns, cos, sin, eps,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """A token's `group`-th GROUP heads of source, normed and rotated, to where they belong in target [HEADS, DIM]."""
    row = group * GROUP + tl.arange(0, GROUP)
    inside = (row < HEADS)[:, None] & (columns < DIM)[None, :]
    rotated = normed_rotated(source, weight, row, columns, inside, cos, sin, eps, DIM, HALF)
    tl.store(target + row[:, None] * DIM + columns[None, :], rotated.to(target.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rope_scale", "eps"])
def norm_rope_cache_kernel(
    q, k, v, q_weight, k_weight, q_out, k_cache, v_cache, k_scale, v_scale, positions, rows, inv_freq, slots,
    rope_scale, eps, q_stride, k_stride, v_stride,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, Q_GROUPS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, ROWED: tl.constexpr, FP8: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid: (tokens, groups of GROUP heads: first those of q, then those of k and v)."""
    # The kernel behind may be brought up; it waits for all of this one, as this one for those ahead.
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    cos, sin = column_rotation(positions, rows, inv_freq, token, columns, rope_scale, HALF, ROWED)
    if group < Q_GROUPS:
        store_normed_rotated(
            q + token * q_stride, q_weight, q_out + token * (Q_HEADS * DIM), group, columns, cos, sin, eps,
            Q_HEADS, GROUP, DIM, HALF,
        )  # fmt: skip
    else:
        slot = tl.load(slots + token)
        if slot >= 0:
            row = (group - Q_GROUPS) * GROUP + tl.arange(0, GROUP)
            inside = (row < K_HEADS)[:, None] & (columns < DIM)[None, :]
            offsets = row[:, None] * DIM + columns[None, :]
            turned = normed_rotated(
                k + token * k_stride, k_weight, row, columns, inside, cos, sin, eps, DIM, HALF
            )  # fmt: skip
            value = tl.load(v + token * v_stride + offsets, inside, 0.0)
            k_scales = tl.full((GROUP, 1), 1.0, tl.float32)
            v_scales = tl.full((GROUP, 1), 1.0, tl.float32)
            if FP8:
                k_scales = tl.load(k_scale + row, row < K_HEADS, 1.0)[:, None]
                v_scales = tl.load(v_scale + row, row < K_HEADS, 1.0)[:, None]
            stored: tl.constexpr = k_cache.dtype.element_ty
            place = slot * (K_HEADS * DIM) + offsets
            # Rounded to the model's dtype first, as a key that passes through memory is.
            key = turned.to(k.dtype.element_ty)
            tl.store(k_cache + place, quantised(key, k_scales, stored, FP8), inside)
            tl.store(v_cache + place, quantised(value, v_scales, stored, FP8), inside)


def norm_rope_write_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    rows: Tensor | None = None,
    scale: float = 1.0,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Norms the heads of q and k, rotates them as `rope` does; token t's key and value go to slot slots[t].

    Args:
        q: [T, Hq, D] float32, bfloat16 or float16, D even; tokens may be strided, a token's heads are contiguous.
        k, v: [T, Hkv, D] likewise, in q's dtype.
        q_weight, k_weight: [D] in q's dtype.
        eps: added to the mean of squares.
        slots: [T] int64: block · block_size + offset, trusted to lie inside the cache; a negative one is skipped.
        k_cache, v_cache: [num_blocks, block_size, Hkv, D] in q's dtype or float8_e4m3fn, contiguous.
        positions, inv_freq, rows, scale: as of `rope`; all of a head is rotated.
        k_scale, v_scale: [Hkv] float32, greater than 0: for an fp8 cache, and only for one.

    Returns:
        The normed and rotated q, contiguous.

    Raises:
        BackendError: a dtype, shape or layout that the kernel does not take.
    """
    name = "norm_rope_write_cache"
    check_rotation(name, q, k, positions, inv_freq, rows)
    check_cache(name, q, k, v, slots, k_cache, v_cache, k_scale, v_scale)
    tokens, q_heads, d = q.shape
    heads, half = k.shape[1], inv_freq.shape[-1]
    require(name, 2 * half == d, f"{half} frequencies do not rotate all of a head of {d}")
    for weight in (q_weight, k_weight):
        require(
            name,
            weight.shape == (d,) and weight.dtype is q.dtype,
            f"weights must be [{d}] of {q.dtype}, not {tuple(weight.shape)} of {weight.dtype}",
        )
    group, block, warps = row_shape(d)
    q, k = canonical_rows(q), canonical_rows(k)
    v = v if v.stride()[1:] == (d, 1) else v.contiguous()
    out = torch.empty((tokens, q_heads, d), dtype=q.dtype, device=q.device)
    if tokens:
        fp8 = k_scale is not None
        q_groups = triton.cdiv(q_heads, group)
        early = has_dependent_launch(q.device)
        with on_device(q):
            norm_rope_cache_kernel[(tokens, q_groups + triton.cdiv(heads, group))](
                q, k, v, canonical_rows(q_weight), canonical_rows(k_weight), out, k_cache, v_cache,
                k_scale if fp8 else inv_freq, v_scale if fp8 else inv_freq, positions.contiguous(),
                positions if rows is None else rows.contiguous(), inv_freq.contiguous(), slots.contiguous(),
                float(scale), eps, q.stride(0), k.stride(0), v.stride(0),
                Q_HEADS=q_heads, K_HEADS=heads, Q_GROUPS=q_groups, DIM=d, HALF=half, GROUP=group, BLOCK=block,
                ROWED=rows is not None, FP8=fp8, EARLY=early, num_warps=warps, launch_pdl=early,
            )  # fmt: skip
    return out
