"""What writes to a paged cache, as PyTorch operators that say so. No gradient passes through a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mainspring.ops.library.support import policy_of
from mainspring.ops.policy import Policy

if TYPE_CHECKING:
    from mainspring.ops.batch import TokenBatch
    from mainspring.ops.rope import RopeAngles


def rope_write_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    angles: RopeAngles,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    interleaved: bool,
    policy: Policy,
) -> Tensor:
    """ops.rope_cache.rope_write_cache as an operator; q stays as it is."""
    result: Tensor = rope_write_cache_op(
        q, k, v, angles.positions, angles.inv_freq, angles.rows, angles.scale, slots, k_cache, v_cache, k_scale,
        v_scale, interleaved, policy.numerics, policy.backend,
    )  # fmt: skip
    return result


@torch.library.custom_op("mainspring::rope_write_cache", mutates_args=("k_cache", "v_cache"))
def rope_write_cache_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    rows: Tensor | None,
    scale: float,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    interleaved: bool,
    numerics: str,
    backend: str | None,
) -> Tensor:
    """q: [T, Hq, D], rotated into a new tensor; k, v: [T, Hkv, D] go to their slots, k rotated."""
    from mainspring.ops.rope import RopeAngles
    from mainspring.ops.rope_cache import ROPE_WRITE_CACHE

    policy = policy_of(numerics, backend)
    q = q.clone(memory_format=torch.contiguous_format)  # which may be overwritten
    angles = RopeAngles(positions, inv_freq, rows, scale)
    with torch.no_grad():
        run = ROPE_WRITE_CACHE.select(q, policy)
        return run(q, k, v, angles, slots, k_cache, v_cache, k_scale, v_scale, interleaved, policy)


@rope_write_cache_op.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def paged_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    batch: TokenBatch,
    layer: int,
    scale: float,
    window: int | None,
    policy: Policy,
) -> Tensor:
    """ops.attention.attention through a paged cache as an operator."""
    cache = batch.cache
    # TokenBatch.paged sets them together.
    assert cache is not None and batch.slots is not None and batch.block_tables is not None
    result: Tensor = paged_attention_op(
        q, k, v, batch.positions, batch.cu_seqlens, batch.context_lens, batch.lengths, batch.contexts, batch.slots,
        batch.block_tables, cache.k[layer], cache.v[layer], None if cache.k_scale is None else cache.k_scale[layer],
        None if cache.v_scale is None else cache.v_scale[layer], scale, window, policy.numerics, policy.backend,
    )  # fmt: skip
    return result


@torch.library.custom_op("mainspring::paged_attention", mutates_args=("k_cache", "v_cache"))
def paged_attention_op(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    positions: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    lengths: Sequence[int],
    contexts: Sequence[int],
    slots: Tensor,
    block_tables: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    scale: float,
    window: int | None,
    numerics: str,
    backend: str | None,
) -> Tensor:
    """q: [T, Hq, D], k, v: [T, Hkv, D], which go to their slots first, or None if they are there -> [T, Hq, D]."""
    from mainspring.ops.attention import ATTENTION
    from mainspring.ops.batch import KVCache, TokenBatch

    policy = policy_of(numerics, backend)
    scales = None if k_scale is None or v_scale is None else ((k_scale,), (v_scale,))
    cache = KVCache((k_cache,), (v_cache,), k_cache.shape[1], *(scales or (None, None)))
    batch = TokenBatch(
        positions, cu_seqlens, context_lens, tuple(lengths), tuple(contexts), tuple(contexts), cache, slots,
        block_tables,
    )  # fmt: skip
    with torch.no_grad():
        run = ATTENTION.select(q, policy, size=q.shape[-1])
        return run(q, k, v, batch, layer=0, scale=scale, window=window, policy=policy)


@paged_attention_op.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)
