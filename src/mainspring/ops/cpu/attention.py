"""Causal attention over packed or paged keys, and writing those of the cache (csrc/kernels/attention.cpp,
write_cache.cpp)."""

from __future__ import annotations

from typing import Literal, overload

import torch

from mainspring.ops.checks import reject
from mainspring.ops.cpu.extension import dtype_code, require_kernels


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor | None,
    scale: float,
    window: int | None = None,
    softcap: float = 0.0,
    return_lse: Literal[False] = False,
) -> torch.Tensor: ...


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor | None,
    scale: float,
    window: int | None = None,
    softcap: float = 0.0,
    *,
    return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor | None,
    scale: float,
    window: int | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of ragged sequences. Query i of the n queries of sequence s stands at position
    p = context_lens[s] - n + i and sees keys j <= p (with a window: j > p - window).

    A query's bits depend only on itself and the keys it sees: decode, chunked prefill, whole prefill, packed
    and paged give the same ones.

    Args:
        q: [T, Hq, D] float32 or bfloat16; tokens may be strided, a token's heads are contiguous. D is a
            multiple of 8, at most 256. Finite, as k and v are.
        k: [T, Hkv, D] with the tokens of q (packed), or the cache [num_blocks, block_size, Hkv, D] (paged).
        v: likewise.
        cu_seqlens: [S + 1] int32, from 0 to T.
        context_lens: [S] int32, keys of each sequence, the queries' own included.
        block_tables: [S, B] int32 with a contiguous last dimension (paged), or None (packed). Trusted.
        scale: factor of the scores before softmax.
        window: sliding window in keys, or None or 0 for all.
        softcap: scores become `softcap * tanh(score / softcap)`; 0 turns it off.
        return_lse: also give the natural logarithm of each query's sum of exponentials.

    Returns:
        [T, Hq, D] in q's dtype, or (that, lse [T, Hq] float32).

    Raises:
        BackendError: a device, dtype, shape or layout that the kernel does not take.
    """
    code = dtype_code("attention", q)
    t, q_heads, d = q.shape
    kv_heads = k.shape[-2]
    dtype = q.dtype
    if k.dtype is not dtype or v.dtype is not dtype or k.shape != v.shape or k.shape[-1] != d:
        raise reject(
            "attention",
            f"k {k.dtype} {tuple(k.shape)} and v {v.dtype} {tuple(v.shape)} do not fit q {dtype} {tuple(q.shape)}",
        )
    if d % 8 or not 0 < d <= 256 or kv_heads == 0 or q_heads % kv_heads:
        raise reject(
            "attention",
            f"head_dim {d} must be a multiple of 8 up to 256, and {kv_heads} divide the {q_heads} heads",
        )
    num_seqs = context_lens.shape[0]
    if (cu_seqlens.dtype, context_lens.dtype) != (torch.int32, torch.int32) or cu_seqlens.shape != (
        num_seqs + 1,
    ):
        raise reject(
            "attention",
            f"cu_seqlens must be [{num_seqs + 1}] int32 and context_lens int32, not {tuple(cu_seqlens.shape)} "
            f"of {cu_seqlens.dtype} and {context_lens.dtype}",
        )
    q_stride = q.stride()
    if q_stride[1:] != (d, 1):
        raise reject("attention", f"a token's heads of q must be contiguous; its strides are {q_stride}")
    k_stride, v_stride = k.stride(), v.stride()
    if k_stride[-2:] != (d, 1) or v_stride[-2:] != (d, 1):
        raise reject(
            "attention", f"a token's heads must be contiguous; strides are {k_stride} and {v_stride}"
        )
    if block_tables is None:
        if k.shape[0] != t or len(k_stride) != 3:
            raise reject("attention", f"packed keys must be [{t}, Hkv, {d}], not {tuple(k.shape)}")
        table_address, table_stride, block_size = 0, 0, 0
    else:
        if (
            block_tables.dtype is not torch.int32
            or block_tables.shape[0] != num_seqs
            or block_tables.stride(1) != 1
        ):
            raise reject(
                "attention",
                f"block_tables must be [{num_seqs}, B] int32, not {tuple(block_tables.shape)} of {block_tables.dtype}",
            )
        block_size = k.shape[1]
        if len(k_stride) != 4 or not (k.is_contiguous() and v.is_contiguous()):
            raise reject(
                "attention",
                f"the cache must be a contiguous [num_blocks, block_size, Hkv, D], not {tuple(k.shape)}",
            )
        k_stride, v_stride = k_stride[1:], v_stride[1:]
        table_address, table_stride = block_tables.data_ptr(), block_tables.stride(0)
    out = q.new_empty((t, q_heads, d))
    lse = torch.empty((t, q_heads), dtype=torch.float32) if return_lse else None
    require_kernels().attention(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), q_stride[0], k_stride[0], v_stride[0], cu_seqlens.data_ptr(),
        context_lens.data_ptr(), table_address, table_stride, block_size, out.data_ptr(),
        0 if lse is None else lse.data_ptr(), num_seqs, q_heads, kv_heads, d, window or 0, scale, softcap, code,
    )  # fmt: skip
    return out if lse is None else (out, lse)


def write_cache(
    k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor
) -> None:
    """Copies token t's key and value to slot slots[t] (block * block_size + offset); a negative slot is skipped.

    Args:
        k: [T, Hkv, D] float32 or bfloat16; tokens may be strided, a token's heads are contiguous.
        v: [T, Hkv, D] likewise.
        slots: [T] int64, contiguous. Slots are trusted to lie inside the cache.
        k_cache: [num_blocks, block_size, Hkv, D] in k's dtype, contiguous.
        v_cache: [num_blocks, block_size, Hkv, D] likewise.

    Raises:
        BackendError: a device, dtype, shape or layout that the kernel does not take.
    """
    code = dtype_code("write_cache", k)
    t, heads, d = k.shape
    k_stride, v_stride = k.stride(), v.stride()
    dtype = k.dtype
    if v.dtype is not dtype or v.shape != k.shape or k_cache.dtype is not dtype or v_cache.dtype is not dtype:
        raise reject(
            "write_cache", f"k, v and the caches differ: {dtype} {tuple(k.shape)}, {v.dtype} {tuple(v.shape)}"
        )
    if k_stride[1:] != (d, 1) or v_stride[1:] != (d, 1):
        raise reject(
            "write_cache", f"a token's heads must be contiguous; strides are {k_stride} and {v_stride}"
        )
    if k_cache.shape[2:] != (heads, d) or v_cache.shape != k_cache.shape:
        raise reject("write_cache", f"cache {tuple(k_cache.shape)} does not hold heads of {tuple(k.shape)}")
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise reject("write_cache", "the caches must be contiguous")
    if slots.dtype is not torch.int64 or slots.shape != (t,) or not slots.is_contiguous():
        raise reject("write_cache", f"slots must be [{t}] int64, not {tuple(slots.shape)} of {slots.dtype}")
    require_kernels().write_cache(
        k.data_ptr(), v.data_ptr(), k_stride[0], v_stride[0], slots.data_ptr(), k_cache.data_ptr(),
        v_cache.data_ptr(), t, heads * d, code,
    )  # fmt: skip
