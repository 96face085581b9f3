"""Attention through the paged cache on CUDA devices: which kernel serves which sequences of a batch.

On Hopper sequences with few queries (decode, drafts) go to a CUDA C++ kernel that reads their keys at the speed of
memory, the others (prompts and chunks of them) to the CUDA C++ flash attention; what these do not take goes to
Triton. All hold the same canonical order, so a row's bits do not depend on the choice, which is made on the host from
lengths that it knows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mainspring.ops.batch import KVCache, TokenBatch
from mainspring.ops.cuda.support import refuses
from mainspring.ops.policy import Policy
from mainspring.ops.registry import Call

TILE_ROWS = 16  # query rows (tokens times heads of a group) for which keys are read once


def paged_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    batch: TokenBatch,
    layer: int,
    scale: float,
    window: int | None,
    policy: Policy,
    softcap: float | None = None,
) -> Tensor:
    """Writes k and v [T, Hkv, D] to layer `layer` of the batch's cache and attends to all keys of each sequence.

    None for k and v: they have been written. q: [T, Hq, D] -> [T, Hq, D]. Raises BackendError for what the kernels do
    not take.
    """
    from mainspring.ops.cuda import paged_attention as cuda
    from mainspring.ops.cuda.paged_prefill import paged_prefill
    from mainspring.ops.triton.attention import attention
    from mainspring.ops.triton.write_cache import write_cache

    cache, tables, slots = batch.cache, batch.block_tables, batch.slots
    assert (
        cache is not None and tables is not None and slots is not None
    )  # TokenBatch.paged sets them together
    keys, values = cache.k[layer], cache.v[layer]
    k_scale = cache.k_scale[layer] if cache.k_scale is not None else None
    v_scale = cache.v_scale[layer] if cache.v_scale is not None else None
    group, longest, context = q.shape[1] // keys.shape[2], max(batch.lengths), max(batch.contexts)
    few = min(max(1, TILE_ROWS // group), longest)
    if min(batch.lengths) > few or not _cuda_decodes(q, keys, few, context, policy):
        few = 0
    tickets = batch.tickets
    if k is not None and v is not None:
        if few and context > cuda.KEY_CHUNK and tickets is None:
            shape = q.shape[0], cuda.tickets_per_sequence(keys.shape[2], group, few)
            tickets = torch.empty(shape, dtype=torch.int32, device=q.device)  # the write makes them zero
        write_cache(k, v, slots, keys, values, k_scale, v_scale, tickets)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if few:
        cuda.paged_decode(
            q, keys, values, batch.cu_seqlens, batch.context_lens, tables, scale, window, softcap,
            max_length=few, max_context=context, out=out, tickets=tickets, k_scale=k_scale, v_scale=v_scale,
        )  # fmt: skip
    if longest > few:
        options: Any = {"max_length": longest, "max_context": context, "out": out, "longer_than": few}
        rest = batch.cu_seqlens, batch.context_lens, tables, scale, window, softcap
        if _cuda_prefills(q, keys, context, policy):
            paged_prefill(q, keys, values, *rest, **options)
        else:
            attention(q, keys, values, *rest, **options, k_scale=k_scale, v_scale=v_scale)
    return out


def reads_lengths_on_the_device(
    cache: KVCache, head_dim: int, group: int, dtype: torch.dtype, policy: Policy
) -> bool:
    """Whether both kernels find the sequences' lengths on the device, so that a CUDA graph can hold their launches for
    any lengths within the batch's bounds. group: query heads a key head."""
    q = torch.empty((1, group, head_dim), dtype=dtype, device=cache.k[0].device)
    few, context = max(1, TILE_ROWS // group), cache.num_blocks * cache.block_size
    return _cuda_decodes(q, cache.k[0], few, context, policy) and _cuda_prefills(
        q, cache.k[0], context, policy
    )


def _cuda_decodes(q: Tensor, keys: Tensor, max_length: int, max_context: int, policy: Policy) -> bool:
    from mainspring.ops.cuda.paged_attention import refusal

    return _on_hopper(q, policy) and refusal(q, keys, max_length, max_context) is None


def _cuda_prefills(q: Tensor, keys: Tensor, max_context: int, policy: Policy) -> bool:
    from mainspring.ops.cuda.paged_prefill import refusal

    return _on_hopper(q, policy) and refusal(q, keys, max_context) is None


def _on_hopper(q: Tensor, policy: Policy) -> bool:
    return policy.backend in (None, "cuda") and refuses(Call(q.device.type, q.dtype, policy, False)) is None
