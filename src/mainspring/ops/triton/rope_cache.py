"""RoPE and the write to a paged cache in one launch: q rotated, k rotated into its slot, v into its slot.

The bits are those of `rope` followed by a write of the rounded keys. An e4m3 cache holds value / scale, one scale a
key-value head: value = float32(stored) · scale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mainspring.ops.triton.rope import (
    check_rotation,
    load_pairs,
    rotate_heads,
    store_pairs,
    token_rotation,
    turned,
)
from mainspring.ops.triton.support import has_dependent_launch, on_device, require

E4M3_MAX = tl.constexpr(448.0)


@triton.jit
def quantised(x, scales, DTYPE: tl.constexpr, FP8: tl.constexpr):
    """x [heads, columns] in DTYPE; for an fp8 cache divided by scales [heads, 1] and kept within its range."""
    if FP8:
        ratio = tl.div_rn(x.to(tl.float32), scales)
        kept = tl.minimum(tl.maximum(ratio, -E4M3_MAX), E4M3_MAX)
        x = tl.where(ratio != ratio, ratio, kept)
    return x.to(DTYPE)


@triton.jit
def _copy_columns(
    source, target, scales, first: tl.constexpr, COUNT: tl.constexpr, HEADS: tl.constexpr, PADDED: tl.constexpr,
    DIM: tl.constexpr, BLOCK: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    heads, columns = tl.arange(0, PADDED), tl.arange(0, BLOCK)
    inside = (heads < HEADS)[:, None] & (columns < COUNT)[None, :]
    offsets = heads[:, None] * DIM + first + columns[None, :]
    value = tl.load(source + offsets, inside, 0.0)
    tl.store(target + offsets, quantised(value, scales, target.dtype.element_ty, FP8), inside)


@triton.jit(do_not_specialize=["scale"])
def rope_cache_kernel(
    q, k, v, q_out, k_cache, v_cache, k_scale, v_scale, positions, rows, inv_freq, slots, scale,
    q_stride, k_stride, v_stride, q_out_stride,
    Q_HEADS: tl.constexpr, Q_PADDED: tl.constexpr, K_HEADS: tl.constexpr, K_PADDED: tl.constexpr, DIM: tl.constexpr,
    HALF: tl.constexpr, Q_REST: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, INTERLEAVED: tl.constexpr, FP8: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid: (tokens,)."""
    # The kernel behind may be brought up; it waits for all of this one, as this one for those ahead.
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    pairs = tl.arange(0, BLOCK)
    c, s = token_rotation(positions, rows, inv_freq, token, pairs, scale, HALF, ROWS, False)
    rotate_heads(
        q + token * q_stride, q_out + token * q_out_stride, c, s, pairs, Q_HEADS, Q_PADDED, DIM, HALF, Q_REST,
        INTERLEAVED,
    )  # fmt: skip
    if slot >= 0:
        heads = tl.arange(0, K_PADDED)
        k_scales = tl.full((K_PADDED, 1), 1.0, tl.float32)
        v_scales = tl.full((K_PADDED, 1), 1.0, tl.float32)
        if FP8:
            k_scales = tl.load(k_scale + heads, heads < K_HEADS, 1.0)[:, None]
            v_scales = tl.load(v_scale + heads, heads < K_HEADS, 1.0)[:, None]
        source, target = k + token * k_stride, k_cache + slot * (K_HEADS * DIM)
        first, second = load_pairs(source, pairs, K_HEADS, K_PADDED, DIM, HALF, INTERLEAVED)
        first, second = turned(first, second, c, s)
        # Rounded to the model's dtype first, as a key that passes through memory is.
        dtype: tl.constexpr = k.dtype.element_ty
        stored: tl.constexpr = k_cache.dtype.element_ty
        first = quantised(first.to(dtype), k_scales, stored, FP8)
        second = quantised(second.to(dtype), k_scales, stored, FP8)
        store_pairs(target, first, second, pairs, K_HEADS, K_PADDED, DIM, HALF, INTERLEAVED)
        if REST > 0:
            _copy_columns(
                source, target, k_scales, 2 * HALF, DIM - 2 * HALF, K_HEADS, K_PADDED, DIM, REST, FP8
            )  # fmt: skip
        _copy_columns(
            v + token * v_stride, v_cache + slot * (K_HEADS * DIM), v_scales, 0, DIM, K_HEADS, K_PADDED, DIM, WIDTH, FP8
        )  # fmt: skip


def rope_write_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
    interleaved: bool = False,
    in_place: bool = False,
) -> Tensor:
    """Rotates queries and keys as `rope` does; token t's key and value go to slot slots[t] of the caches.

    Args:
        q: [T, Hq, D] float32, bfloat16 or float16; tokens may be strided, a token's heads are contiguous.
        k: [T, Hkv, D] likewise, in q's dtype; left as it is.
        v: [T, Hkv, D] likewise.
        slots: [T] int64: block · block_size + offset, trusted to lie inside the cache; a negative one is skipped.
        k_cache: [num_blocks, block_size, Hkv, D] in q's dtype or float8_e4m3fn, contiguous.
        v_cache: likewise.
        positions, inv_freq, rows, scale, interleaved: as of `rope`.
        k_scale: [Hkv] float32, greater than 0: for an fp8 cache, and only for one.
        v_scale: likewise.
        in_place: overwrite q (where a token's heads are contiguous) and return it.

    Returns:
        The rotated q.

    Raises:
        BackendError: a dtype, shape or layout that the kernel does not take.
    """
    name = "rope_write_cache"
    check_rotation(name, q, k, positions, inv_freq, rows)
    check_cache(name, q, k, v, slots, k_cache, v_cache, k_scale, v_scale)
    tokens, q_heads, d = q.shape
    heads, half = k.shape[1], inv_freq.shape[-1]
    require(name, half > 0, "inv_freq is empty")
    q, k, v = (x if x.stride()[1:] == (d, 1) else x.contiguous() for x in (q, k, v))
    q_out = q if in_place else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if tokens:
        rest = triton.next_power_of_2(d - 2 * half) if d > 2 * half else 0
        fp8 = k_scale is not None
        early = has_dependent_launch(q.device)
        with on_device(q):
            rope_cache_kernel[(tokens,)](
                q, k, v, q_out, k_cache, v_cache, k_scale if fp8 else inv_freq, v_scale if fp8 else inv_freq,
                positions.contiguous(), positions if rows is None else rows.contiguous(), inv_freq.contiguous(),
                slots.contiguous(), float(scale), q.stride(0), k.stride(0), v.stride(0), q_out.stride(0),
                Q_HEADS=q_heads, Q_PADDED=triton.next_power_of_2(q_heads), K_HEADS=heads,
                K_PADDED=triton.next_power_of_2(heads), DIM=d, HALF=half, Q_REST=0 if in_place else rest, REST=rest,
                BLOCK=triton.next_power_of_2(half), WIDTH=triton.next_power_of_2(d), ROWS=rows is not None,
                INTERLEAVED=interleaved, FP8=fp8, EARLY=early, launch_pdl=early,
            )  # fmt: skip
    return q_out


def check_cache(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    """Raises BackendError unless keys, values, slots, caches and scales fit each other."""
    tokens, heads, d = k.shape
    require(
        name,
        v.shape == k.shape and v.dtype is k.dtype,
        f"v {v.dtype} {tuple(v.shape)} does not fit k {k.dtype} {tuple(k.shape)}",
    )
    require(
        name,
        slots.dtype is torch.int64 and slots.shape == (tokens,),
        f"slots must be [{tokens}] int64, not {tuple(slots.shape)} of {slots.dtype}",
    )
    require(
        name,
        k_cache.dim() == 4
        and k_cache.shape[2:] == (heads, d)
        and v_cache.shape == k_cache.shape
        and k_cache.is_contiguous()
        and v_cache.is_contiguous(),
        f"cache {tuple(k_cache.shape)} must be contiguous and hold heads of {tuple(k.shape)}",
    )
    fp8 = k_cache.dtype is torch.float8_e4m3fn
    require(
        name,
        v_cache.dtype is k_cache.dtype and (fp8 or k_cache.dtype is q.dtype),
        f"caches must both be {q.dtype} or float8_e4m3fn, not {k_cache.dtype} and {v_cache.dtype}",
    )
    for scales in (k_scale, v_scale):
        require(
            name,
            (scales is not None) == fp8,
            f"a cache of {k_cache.dtype} {'needs' if fp8 else 'has no'} k_scale and v_scale",
        )
        require(
            name,
            scales is None or (scales.shape == (heads,) and scales.dtype is torch.float32 and scales.is_contiguous()),
            f"k_scale and v_scale must be [{heads}] float32",
        )  # fmt: skip
