"""Writing keys and values to the slots of a paged cache, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mainspring.ops.triton.support import on_device, require

FP8_DTYPE = torch.float8_e4m3fn
FP8_MAX = tl.constexpr(448.0)


@triton.jit
def _store_slot(source, scales, cache, index, inside, HEAD_DIM: tl.constexpr, FP8: tl.constexpr):
    value = tl.load(source + index, inside)
    if FP8:
        scale = tl.load(scales + index // HEAD_DIM, inside, 1.0)
        value = tl.div_rn(value.to(tl.float32), scale)
        value = tl.clamp(value, -FP8_MAX, FP8_MAX, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)
    tl.store(cache + index, value, inside)


@triton.jit
def write_cache_kernel(
    k, v, slots, k_cache, v_cache, k_scale, v_scale, tickets, k_stride, v_stride,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, FP8: tl.constexpr,
    TICKETS: tl.constexpr, TICKET_BLOCK: tl.constexpr,
):  # fmt: skip
    """A token's heads to its slot. Grid: (T,)."""
    token = tl.program_id(0).to(tl.int64)
    if TICKETS > 0:
        index = tl.arange(0, TICKET_BLOCK)
        tl.store(tickets + token * TICKETS + index, tl.zeros((TICKET_BLOCK,), tl.int32), index < TICKETS)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    for first in tl.static_range(0, WIDTH, BLOCK):
        index = first + tl.arange(0, BLOCK)
        inside = index < WIDTH
        _store_slot(k + token * k_stride, k_scale, k_cache + slot * WIDTH, index, inside, HEAD_DIM, FP8)
        _store_slot(v + token * v_stride, v_scale, v_cache + slot * WIDTH, index, inside, HEAD_DIM, FP8)


def write_cache(
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    tickets: Tensor | None = None,
) -> None:
    """Copies token t's key and value to slot slots[t] (block * block_size + offset); a negative slot is skipped.

    Args:
        k: [T, Hkv, D]; tokens may be strided.
        v: [T, Hkv, D] likewise.
        slots: [T] int64. Slots are trusted to lie inside the cache.
        k_cache: [num_blocks, block_size, Hkv, D] in k's dtype or float8_e4m3fn, contiguous.
        v_cache: likewise.
        k_scale: [Hkv] float32, above 0; float8 stores k / k_scale, clamped to its range. With float8 only, where it
            is required.
        v_scale: likewise.
        tickets: [T, *] int32, contiguous, which becomes zero: the counters of an attention kernel that follows.

    Raises:
        BackendError: a dtype, shape or layout that the kernel does not take.
    """
    name = "write_cache"
    tokens, heads, d = k.shape
    require(
        name,
        v.shape == k.shape
        and v.dtype is k.dtype
        and v_cache.dtype is k_cache.dtype
        and k_cache.dtype in (k.dtype, FP8_DTYPE),
        f"k, v and the caches differ: {k.dtype} {tuple(k.shape)}, {v.dtype} {tuple(v.shape)}, {k_cache.dtype}",
    )
    require(
        name,
        k_cache.shape[2:] == (heads, d)
        and v_cache.shape == k_cache.shape
        and k_cache.is_contiguous()
        and v_cache.is_contiguous(),
        f"cache {tuple(k_cache.shape)} must be contiguous and hold heads of {tuple(k.shape)}",
    )
    require(
        name,
        slots.dtype is torch.int64 and slots.shape == (tokens,),
        f"slots must be [{tokens}] int64, not {tuple(slots.shape)} of {slots.dtype}",
    )
    check_scales(name, k_cache, k_scale, v_scale)
    k, v = (x if x.stride()[1:] == (d, 1) else x.contiguous() for x in (k, v))
    count = 0 if tickets is None else tickets.shape[1]
    if tokens:
        with on_device(k):
            write_cache_kernel[(tokens,)](
                k, v, slots.contiguous(), k_cache, v_cache, k_scale, v_scale, tickets, k.stride(0), v.stride(0),
                HEAD_DIM=d, WIDTH=heads * d, BLOCK=min(1024, triton.next_power_of_2(heads * d)),
                FP8=k_scale is not None, TICKETS=count, TICKET_BLOCK=triton.next_power_of_2(max(count, 1)),
            )  # fmt: skip


def check_scales(operation: str, cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    """float8 keys and values come with a scale for each head, others without."""
    for scales in (k_scale, v_scale):
        require(
            operation,
            (scales is not None) == (cache.dtype is FP8_DTYPE),
            f"k_scale and v_scale belong to a cache of {FP8_DTYPE}, and only to it; the cache is of {cache.dtype}",
        )
        require(
            operation,
            scales is None
            or (
                scales.dtype is torch.float32
                and scales.shape == cache.shape[-2:-1]
                and scales.is_contiguous()
            ),
            f"k_scale and v_scale must be contiguous [{cache.shape[-2]}] of float32",
        )
