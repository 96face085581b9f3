"""Attention of prompts and chunks of them over a paged cache, by csrc/cuda/flash_forward.cu, in canonical order.

It gives the bits of `paged_decode` and of `ops.triton.attention`. A tile of queries belongs to one head: it is meant
for sequences with more queries than `paged_decode` takes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mainspring.ops.cuda.flash_forward import TYPES, described, launch, variant_of
from mainspring.ops.cuda.paged_attention import check_paged, too_many_keys
from mainspring.ops.cuda.support import CANONICAL_HEAD_SIZES
from mainspring.ops.triton.support import require


def refusal(q: Tensor, k_cache: Tensor, max_context: int) -> str | None:
    """Why the kernel does not take such a call, or None."""
    block_size = k_cache.shape[1]
    if q.dtype not in TYPES or k_cache.dtype is not q.dtype:
        return (
            f"computes with queries and a cache of bfloat16 or of float16, not {q.dtype} and {k_cache.dtype}"
        )
    if q.shape[-1] not in CANONICAL_HEAD_SIZES:
        return f"has head sizes {', '.join(map(str, CANONICAL_HEAD_SIZES))}, not {q.shape[-1]}"
    if block_size % 16:
        return f"takes blocks of a multiple of 16 keys, not of {block_size}"
    return too_many_keys(block_size, max_context)


def paged_prefill(
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
    longer_than: int = 0,
) -> Tensor:
    """Causal attention of the sequences that have more than `longer_than` queries; the rows of others stay as they are.

    Args:
        q: [T, Hq, D] bfloat16 or float16; D is 64, 96 or 128. Tokens and heads may be strided.
        k_cache: [num_blocks, block_size, Hkv, D] contiguous, in q's dtype; block_size is a multiple of 16.
        v_cache: likewise.
        cu_seqlens: [S + 1] int32, from 0 to T.
        context_lens: [S] int32, keys of each sequence, the queries' own included.
        block_tables: [S, B] int32 with a contiguous last dimension. Trusted.
        scale: factor of the scores before softmax, above 0.
        window: sliding window in keys, or None or 0 for all.
        softcap: scores become softcap · tanh(scores / softcap), or None or 0 for none.
        max_length: the largest number of queries of a sequence.
        max_context: no sequence has more keys.
        out: [T, Hq, D] contiguous to write to, or None.
        lse: [Hq, T] float32 to write natural logarithms of the sums of exp(scores) to, or None.
        longer_than: see above.

    Returns:
        [T, Hq, D] in q's dtype.

    Raises:
        BackendError: a dtype, shape or layout that the kernel does not take, or no nvcc.
    """
    name = "paged_prefill"
    problem = refusal(q, k_cache, max_context)
    require(name, problem is None, problem or "")
    check_paged(name, q, k_cache, v_cache, cu_seqlens, context_lens, block_tables, scale, out, lse)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    if q.shape[0] == 0:
        return out
    variant = variant_of(
        q.shape[2], True, bool(window), bool(softcap), canonical=True, max_q=max_length, paged=True
    )
    launch(
        described(q), k_cache.flatten(0, 1), v_cache.flatten(0, 1), out, lse, cu_seqlens, context_lens, block_tables,
        scale, True, window or 0, softcap or 0.0, variant, block_size=k_cache.shape[1], longer_than=longer_than,
    )  # fmt: skip
    return out
