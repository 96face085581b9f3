"""Causal attention in canonical order over packed and paged keys, in Triton.

One loop over all keys does it where queries are many (prefill, training); where they are few (decode) a program takes a
chunk, and the same formulas join the chunks in the same order (canonical_order.py).
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mainspring.ops.triton.attention_kernels import attention_kernel, merge_kernel
from mainspring.ops.triton.canonical_order import KEY_CHUNK, LOG2_E, Tile, tile_of
from mainspring.ops.triton.support import (
    ALIGNMENT,
    check_dtype,
    has_tma,
    multiprocessors,
    on_device,
    require,
    shared_memory,
)
from mainspring.ops.triton.write_cache import FP8_DTYPE, check_scales

MAX_HEAD_DIM = 256
PARTIAL_BYTES = 256 << 20  # of a decode's partial outputs; beyond it the chunks are walked in one loop


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    block_tables: Tensor | None,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    *,
    max_length: int,
    max_context: int,
    lse: Tensor | None = None,
    out: Tensor | None = None,
    longer_than: int = 0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    split: bool | None = None,
    tile: Tile | None = None,
    chunk: int = KEY_CHUNK,
) -> Tensor:
    """Causal attention of ragged sequences. Query i of the n queries of sequence s stands at position
    p = context_lens[s] - n + i and sees keys j <= p (with a window: j > p - window).

    Args:
        q: [T, Hq, D] float32, bfloat16 or float16; tokens may be strided, a token's heads are contiguous.
            D is at most 256. Finite, as k and v are.
        k: [T, Hkv, D] with the tokens of q (packed), or the cache [num_blocks, block_size, Hkv, D] (paged).
        v: likewise.
        cu_seqlens: [S + 1] int32, from 0 to T.
        context_lens: [S] int32, keys of each sequence, the queries' own included.
        block_tables: [S, B] int32 with a contiguous last dimension (paged), or None (packed). Trusted.
        scale: factor of the scores before softmax, above 0.
        window: sliding window in keys, or None or 0 for all.
        softcap: scores become softcap · tanh(scores / softcap); None or 0 for none.
        max_length: the largest number of queries of a sequence.
        max_context: the largest of context_lens.
        lse: [Hq, T] float32, contiguous: gets the natural logarithms of the sums of exp(scores), which a
            backward pass needs; None for none.
        out: [T, Hq, D] in q's dtype, contiguous, to write to.
        longer_than: sequences with at most so many queries are another kernel's: their rows stay as they are.
        k_scale: [Hkv] float32, contiguous: what each head's stored keys are to be multiplied by; with a float8_e4m3fn
            cache, and required there.
        v_scale: likewise, of the values.
        split: a program per chunk (True) or a loop over chunks (False); None chooses. It changes no bit.
        tile: another tile than the table's (tests and benchmarks); its `keys` are part of the order of sums.
        chunk: another size of chunks, likewise.

    Returns:
        [T, Hq, D] in q's dtype.

    Raises:
        BackendError: a dtype, shape, layout or scale that the kernel does not take.
    """
    q, k, v = _check(q, k, v, cu_seqlens, context_lens, block_tables, scale)
    check_scales("attention", k, k_scale, v_scale)
    tokens, q_heads, d = q.shape
    out = torch.empty((tokens, q_heads, d), dtype=q.dtype, device=q.device) if out is None else out
    if tokens == 0:
        return out
    kv_heads, num_seqs, paged = k.shape[-2], context_lens.shape[0], block_tables is not None
    group, dim = q_heads // kv_heads, max(16, triton.next_power_of_2(d))
    loop_tile = tile or tile_of(dim, q.dtype)
    chunks = triton.cdiv(max_context, chunk)
    if split is None:
        tiles = tokens * group // loop_tile.rows + num_seqs
        few = min(tiles, tokens) * kv_heads < 4 * multiprocessors(q.device)
        split = few or max_length == 1
    split = split and chunks > 1 and chunks * tokens * q_heads * d * 4 <= PARTIAL_BYTES
    tile = tile or (tile_of(dim, q.dtype, split=True) if split else loop_tile)
    tiles = tokens * group // tile.rows + num_seqs
    tma = not paged and not split and _described(k) and _described(v) and q.dtype != torch.float32
    window, cap = window or 0, softcap or 0.0
    factor = 1.0 if cap else scale * LOG2_E
    caps = (2 * LOG2_E * scale / cap, cap * LOG2_E) if cap else (0.0, 0.0)
    require(
        "attention",
        lse is None
        or (lse.dtype is torch.float32 and lse.shape == (q_heads, tokens) and lse.is_contiguous()),
        f"lse must be a contiguous [{q_heads}, {tokens}] of float32",
    )
    fits = tile.stages * 2 * tile.keys * dim * q.element_size() <= shared_memory(q.device)
    stages = tile.stages if fits else 1
    part_out, part_state = out, out
    if split:
        part_out = torch.empty((chunks, tokens, q_heads, d), dtype=torch.float32, device=q.device)
        part_state = torch.empty((2, chunks, tokens, q_heads), dtype=torch.float32, device=q.device)
    with on_device(q):
        attention_kernel[(tiles, kv_heads, chunks if split else 1)](
            q, _tiles_of(k, tile, dim) if tma else k, _tiles_of(v, tile, dim) if tma else v, k_scale, v_scale, out, lse,
            part_out, part_state, cu_seqlens, context_lens, block_tables, factor, *caps, window, num_seqs, longer_than,
            tokens, q.stride(0), k.stride(-3), v.stride(-3), block_tables.stride(0) if block_tables is not None else 0,
            q_heads, group, HEAD_DIM=d, DIM=dim, ROWS=tile.rows, KEYS=tile.keys, CHUNK=chunk,
            PAGED=paged, BLOCK_SIZE=k.shape[1] if paged else 1, WINDOWED=window > 0, CAPPED=cap > 0, TMA=tma,
            SPLIT=split, LSE=lse is not None, FP8=k_scale is not None,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_warps=tile.warps, num_stages=stages,
        )  # fmt: skip
        if split:
            merge_kernel[(tokens, q_heads)](
                part_out, part_state, k_scale, v_scale, out, lse, cu_seqlens, context_lens, factor, window, num_seqs,
                longer_than, tokens, chunks, q_heads, group, HEAD_DIM=d, DIM=dim, CHUNK=chunk,
                WINDOWED=window > 0, CAPPED=cap > 0, LSE=lse is not None, FP8=k_scale is not None, UNROLL=8,
                num_warps=1,
            )  # fmt: skip
    return out


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    block_tables: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors, with a token's heads contiguous."""
    name = "attention"
    check_dtype(name, q)
    tokens, q_heads, d = q.shape
    kv_heads, num_seqs = k.shape[-2], context_lens.shape[0]
    require(
        name,
        k.dtype in (q.dtype, FP8_DTYPE) and v.dtype is k.dtype and k.shape == v.shape and k.shape[-1] == d,
        f"k {k.dtype} {tuple(k.shape)} and v {v.dtype} {tuple(v.shape)} do not fit q {q.dtype} {tuple(q.shape)}",
    )
    require(
        name,
        0 < d <= MAX_HEAD_DIM and kv_heads > 0 and q_heads % kv_heads == 0,
        f"head_dim {d} must be at most {MAX_HEAD_DIM}, and {kv_heads} key heads divide the {q_heads} heads",
    )
    require(name, scale > 0, f"scale must be above 0, not {scale}")
    require(
        name,
        cu_seqlens.dtype is context_lens.dtype is torch.int32 and cu_seqlens.shape == (num_seqs + 1,),
        f"cu_seqlens must be [{num_seqs + 1}] int32 and context_lens int32, not {tuple(cu_seqlens.shape)} of "
        f"{cu_seqlens.dtype} and {context_lens.dtype}",
    )
    if block_tables is None:
        require(
            name,
            k.dim() == 3 and k.shape[0] == tokens,
            f"packed keys must be [{tokens}, Hkv, {d}], not {tuple(k.shape)}",
        )
        k, v = (x if x.stride()[1:] == (d, 1) else x.contiguous() for x in (k, v))
    else:
        require(
            name,
            block_tables.dtype is torch.int32
            and block_tables.shape[0] == num_seqs
            and block_tables.stride(1) == 1,
            f"block_tables must be [{num_seqs}, B] int32, not {tuple(block_tables.shape)} of {block_tables.dtype}",
        )
        require(
            name,
            k.dim() == 4 and k.is_contiguous() and v.is_contiguous(),
            f"the cache must be a contiguous [num_blocks, block_size, Hkv, D], not {tuple(k.shape)}",
        )
    return q if q.stride()[1:] == (d, 1) else q.contiguous(), k, v


def _described(x: Tensor) -> bool:
    """Whether packed keys can be read by a tensor descriptor."""
    return (
        has_tma(x.device)
        and x.data_ptr() % ALIGNMENT == 0
        and x.stride(0) * x.element_size() % ALIGNMENT == 0
    )


def _tiles_of(x: Tensor, tile: Tile, dim: int) -> TensorDescriptor:
    """Packed keys [T, Hkv, D] as rows of Hkv · D: a block may read into the next head, whose columns multiply
    zeros of q (keys) or make columns that are not stored (values)."""
    rows, heads, d = x.shape
    return TensorDescriptor(x, [rows, heads * d], [x.stride(0), 1], [tile.keys, dim])
