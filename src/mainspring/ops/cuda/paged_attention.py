"""Attention of few queries over a paged cache (decode), by csrc/cuda/paged_attention.cu, in canonical order.

It gives the bits of `ops.triton.attention` at the speed of memory. The keys of a sequence are read once for every 16
query rows (tokens times the query heads of a group): it is meant for single tokens and short drafts.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from mainspring.ops.cuda import compiler
from mainspring.ops.triton.support import multiprocessors, on_device, require

SOURCE = "paged_attention.cu"
KEY_CHUNK = 1024  # as in csrc/cuda/canonical.cuh
SHARED_BYTES = 227 << 10  # of a block, on Hopper
FP8 = torch.float8_e4m3fn
ELEMENTS = {torch.bfloat16: "__nv_bfloat16", torch.float16: "__half"}
LOG2_E = math.log2(math.e)


class _Arguments(ctypes.Structure):
    """Arguments of the kernel's launcher, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k_cache", "v_cache", "k_scale", "v_scale", "out")),
        *((name, ctypes.c_void_p) for name in ("lse", "partial", "tickets")),
        *((name, ctypes.c_void_p) for name in ("cu_seqlens", "context_lens", "tables")),
        *((name, ctypes.c_float) for name in ("scale", "cap_in", "cap_out")),
        *((name, ctypes.c_int) for name in ("window", "num_seqs", "tokens", "q_stride", "table_stride", "kv_heads")),
        *((name, ctypes.c_int) for name in ("group", "block_size", "cache_rows", "tile_rows", "tiles", "rows")),
        *((name, ctypes.c_int) for name in ("max_length", "max_keys")),
    )  # fmt: skip


def refusal(q: Tensor, k_cache: Tensor, max_length: int, max_context: int) -> str | None:
    """Why these kernels do not take such a call, or None."""
    head_dim, block_size = q.shape[-1], k_cache.shape[1]
    multiple = 32 if k_cache.dtype is FP8 else 16
    if q.dtype not in ELEMENTS:
        return f"computes in bfloat16 and float16, not in {q.dtype}"
    if k_cache.dtype not in (q.dtype, FP8):
        return f"takes a cache of {q.dtype} or {FP8}, not of {k_cache.dtype}"
    if head_dim % multiple or not 0 < head_dim <= 256:
        return f"takes heads of a multiple of {multiple} up to 256, not of {head_dim}"
    if block_size % 16:
        return f"takes blocks of a multiple of 16 keys, not of {block_size}"
    if max_length < 1:
        return f"max_length must be at least 1, not {max_length}"
    return too_many_keys(block_size, max_context)


def too_many_keys(block_size: int, max_context: int) -> str | None:
    """The kernels divide positions by a multiplication in 32 bits."""
    if max_context * block_size < 1 << 32:
        return None
    return f"takes fewer than {(1 << 32) // block_size} keys in blocks of {block_size}, not {max_context}"


def tickets_per_sequence(kv_heads: int, group: int, max_length: int) -> int:
    """Counters of `paged_decode` for a sequence."""
    rows = group * max_length
    return kv_heads * -(-rows // _tile_rows(rows))


def _tile_rows(rows: int) -> int:
    """Query rows of a tile, for so many of a sequence and key head: tokens times the query heads of a group."""
    return 8 if rows <= 8 else 16


def paged_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    *,
    max_length: int,
    max_context: int,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    tickets: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    max_warps: int = 32,
    defines: compiler.Defines = (),
) -> Tensor:
    """Causal attention of the sequences that have at most `max_length` queries; the rows of others stay as they are.

    Args:
        q: [T, Hq, D] bfloat16 or float16; tokens may be strided, a token's heads are contiguous.
        k_cache: [num_blocks, block_size, Hkv, D] contiguous, in q's dtype or float8_e4m3fn; block_size is a multiple
            of 16.
        v_cache: likewise.
        cu_seqlens: [S + 1] int32, from 0 to T.
        context_lens: [S] int32, keys of each sequence, the queries' own included.
        block_tables: [S, B] int32 with a contiguous last dimension. Trusted.
        scale: factor of the scores before softmax, above 0.
        window: sliding window in keys, or None or 0 for all.
        softcap: scores become softcap · tanh(scores / softcap), or None or 0 for none.
        max_length: sequences with more queries are skipped.
        max_context: no sequence has more keys; it may be larger than the largest of context_lens (CUDA graphs).
        out: [T, Hq, D] contiguous to write to, or None.
        lse: [Hq, T] float32 to write natural logarithms of the sums of exp(scores) to, or None.
        tickets: contiguous int32, zero, at least `tickets_per_sequence` for each of S sequences; they are zero again
            after the call. None allocates them.
        k_scale: [Hkv] float32, above 0: what each head's stored keys are to be multiplied by. With float8 only, and
            required there. Half precision then multiplies: the bits are not those of a 16-bit cache.
        v_scale: likewise, of the values.
        max_warps: at most so many warps a multiprocessor (benchmarks).
        defines: other compile-time choices (benchmarks).

    Returns:
        [T, Hq, D] in q's dtype.

    Raises:
        BackendError: a dtype, shape or layout that the kernel does not take, or no nvcc.
    """
    name = "paged_decode"
    problem = refusal(q, k_cache, max_length, max_context)
    require(name, problem is None, problem or "")
    check_paged(name, q, k_cache, v_cache, cu_seqlens, context_lens, block_tables, scale, out, lse)
    tokens, q_heads, d = q.shape
    kv_heads, num_seqs = k_cache.shape[2], context_lens.shape[0]
    fp8 = k_cache.dtype is FP8
    for scales in (k_scale, v_scale):
        require(
            name,
            (scales is not None) == fp8
            and (
                scales is None
                or (scales.dtype is torch.float32 and scales.shape == (kv_heads,) and scales.is_contiguous())
            ),
            f"k_scale and v_scale must be contiguous [{kv_heads}] float32 with a cache of {FP8}, and None with others",
        )
    if q.stride()[1:] != (d, 1) or q.stride(0) % 2 or q.data_ptr() % 4:
        q = q.contiguous()
    out = torch.empty((tokens, q_heads, d), dtype=q.dtype, device=q.device) if out is None else out
    if tokens == 0:
        return out
    group = q_heads // kv_heads
    tile_rows = _tile_rows(group * max_length)
    tiles, rows = -(-group * max_length // tile_rows), min(tile_rows, group * max_length)
    # Lengths are read while the kernel that writes them may still run: until it has ended they are held within tables.
    max_keys = min(max_context, block_tables.shape[1] * k_cache.shape[1])
    chunks = -(-max_keys // KEY_CHUNK)
    units = num_seqs * chunks * kv_heads * tiles if chunks > 1 else 0
    partial = torch.empty(units * rows * (d + 4), dtype=torch.float32, device=q.device)
    if tickets is None:
        count = num_seqs * tickets_per_sequence(kv_heads, group, max_length) if chunks > 1 else 0
        tickets = torch.zeros(count, dtype=torch.int32, device=q.device)
    cap = softcap or 0.0
    arguments = _Arguments(
        *(None if x is None else x.data_ptr() for x in (q, k_cache, v_cache, k_scale, v_scale, out, lse)),
        *(x.data_ptr() for x in (partial, tickets, cu_seqlens, context_lens, block_tables)),
        1.0 if cap else scale * LOG2_E, 2 * LOG2_E * scale / cap if cap else 0.0, cap * LOG2_E,
        window or 0, num_seqs, tokens, q.stride(0), block_tables.stride(0), kv_heads,
        group, k_cache.shape[1], k_cache.shape[0] * k_cache.shape[1], tile_rows, tiles, rows, max_length, max_keys,
    )  # fmt: skip
    library = _library(d, q.dtype, fp8, defines)
    with on_device(q):
        stream = torch.cuda.current_stream(q.device).cuda_stream
        code = library.mainspring_paged_decode(
            ctypes.byref(arguments),
            multiprocessors(q.device),
            SHARED_BYTES,
            max_warps,
            ctypes.c_void_p(stream),
        )
    compiler.check(library, name, code)
    return out


def check_paged(
    name: str,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    scale: float,
    out: Tensor | None,
    lse: Tensor | None,
) -> None:
    """Raises BackendError for tensors that do not belong together."""
    tokens, q_heads, d = q.shape
    kv_heads, num_seqs = k_cache.shape[2], context_lens.shape[0]
    require(
        name,
        k_cache.dtype is v_cache.dtype
        and k_cache.shape == v_cache.shape
        and k_cache.shape[3] == d
        and k_cache.is_contiguous()
        and v_cache.is_contiguous(),
        f"the caches must be contiguous [num_blocks, block_size, Hkv, {d}] of one dtype, not {tuple(k_cache.shape)} of "
        f"{k_cache.dtype} and {tuple(v_cache.shape)} of {v_cache.dtype}",
    )
    require(name, q_heads % kv_heads == 0, f"{kv_heads} key heads do not divide {q_heads} heads")
    require(name, scale > 0, f"scale must be above 0, not {scale}")
    require(
        name,
        cu_seqlens.dtype is context_lens.dtype is block_tables.dtype is torch.int32
        and cu_seqlens.shape == (num_seqs + 1,)
        and block_tables.shape[0] == num_seqs
        and block_tables.stride(1) == 1,
        f"cu_seqlens, context_lens and block_tables must be int32 [S + 1], [S], [S, B], not {tuple(cu_seqlens.shape)}, "
        f"{tuple(context_lens.shape)}, {tuple(block_tables.shape)}",
    )
    require(
        name,
        out is None or (out.shape == q.shape and out.dtype is q.dtype and out.is_contiguous()),
        f"out must be a contiguous [{tokens}, {q_heads}, {d}] of {q.dtype}",
    )
    require(
        name,
        lse is None
        or (lse.dtype is torch.float32 and lse.shape == (q_heads, tokens) and lse.is_contiguous()),
        f"lse must be a contiguous [{q_heads}, {tokens}] of float32",
    )


def kernel(head_dim: int, dtype: torch.dtype, fp8: bool) -> tuple[str, compiler.Defines]:
    """What `compiler.build` compiles for such caches."""
    return SOURCE, (("HEAD_DIM", head_dim), ("ELEMENT", ELEMENTS[dtype]), ("FP8", int(fp8)))


def _library(head_dim: int, dtype: torch.dtype, fp8: bool, defines: compiler.Defines) -> Any:
    source, own = kernel(head_dim, dtype, fp8)
    return compiler.load(source, (*own, *defines))
