"""RoPE and the write of keys and values to a paged cache as one operation."""

from __future__ import annotations

import torch
from torch import Tensor

from mainspring.errors import BackendError
from mainspring.ops import library
from mainspring.ops.batch import KVCache, TokenBatch, check_block_tables
from mainspring.ops.checks import check_heads, debugging, described
from mainspring.ops.policy import LOCKSTEP, Policy
from mainspring.ops.registry import Implementation, Operation, accepts_floats, any_requires_grad
from mainspring.ops.rope import RopeAngles, check_angles, rope
from mainspring.ops.triton.support import refuses as triton_refuses

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


def rope_write_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    angles: RopeAngles,
    batch: TokenBatch,
    *,
    layer: int,
    interleaved: bool = False,
    policy: Policy = LOCKSTEP,
) -> Tensor:
    """The rotated q, after the rotated k and v went to their slots in layer `layer` of the batch's cache.

    q: [T, Hq, D] (may be overwritten), k, v: [T, Hkv, D] -> [T, Hq, D]. The cache has their dtype, or float8_e4m3fn
    with the scales that it carries. A negative slot is skipped. No gradient is recorded. Raises BackendError.
    """
    cache = check_write("rope_write_cache", q, k, v, batch, layer)
    check_angles("rope_write_cache", angles, q)
    assert batch.slots is not None  # beside a cache, as has been checked
    k_scale = None if cache.k_scale is None else cache.k_scale[layer]
    v_scale = None if cache.v_scale is None else cache.v_scale[layer]
    if library.is_traced():
        return library.rope_write_cache(
            q,
            k,
            v,
            angles,
            batch.slots,
            cache.k[layer],
            cache.v[layer],
            k_scale,
            v_scale,
            interleaved,
            policy,
        )
    run = ROPE_WRITE_CACHE.select(q, policy)
    return run(
        q, k, v, angles, batch.slots, cache.k[layer], cache.v[layer], k_scale, v_scale, interleaved, policy
    )


def check_write(operation: str, q: Tensor, k: Tensor, v: Tensor, batch: TokenBatch, layer: int) -> KVCache:
    """The batch's cache, into whose layer the heads of k and v fit. Raises BackendError; records no gradient."""
    cache = batch.cache
    if cache is None or batch.slots is None:
        raise BackendError(f"{operation}: the batch has no cache")
    if any_requires_grad(q, k, v):
        raise BackendError("a KV cache has no gradient; run the model under torch.no_grad()")
    check_heads(operation, q, k, v)
    if not 0 <= layer < len(cache.k):
        raise BackendError(f"{operation}: layer {layer} of a cache with {len(cache.k)} layers")
    held, (tokens, heads, dim) = cache.k[layer], k.shape
    _, _, held_heads, held_dim = held.shape
    if (
        held_heads != heads
        or held_dim != dim
        or (held.dtype is not k.dtype and held.dtype is not FP8)
        or held.device != k.device
    ):
        raise BackendError(f"{operation}: k {described(k)} does not fit a cache of {described(held)}")
    if tokens != batch.positions.shape[0]:
        raise BackendError(f"{operation}: {tokens} tokens, and {batch.num_tokens} in the batch")
    if debugging():
        check_block_tables(batch)
    return cache


def reference(
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
    """`rope`, then the writes."""
    q, k = rope(q, k.clone(), angles, interleaved=interleaved, policy=policy)
    written = slots >= 0
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        if scale is not None:
            x = (x.float() / scale[:, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8)
        # Byte by byte, since torch copies no fp8 by index.
        rows = cache.view(torch.uint8).flatten(0, 1)
        rows[slots[written]] = x[written].contiguous().view(torch.uint8)
    return q


def _triton(
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
    from mainspring.ops.triton.rope_cache import rope_write_cache as fused

    return fused(
        q, k, v, slots, k_cache, v_cache, angles.positions, angles.inv_freq, angles.rows, angles.scale,
        k_scale=k_scale, v_scale=v_scale, interleaved=interleaved, in_place=True,
    )  # fmt: skip


ROPE_WRITE_CACHE = Operation(
    "rope_write_cache",
    Implementation("cpu", reference, lambda call: None if call.device_type == "cpu" else "runs on the CPU"),
    Implementation("triton", _triton, triton_refuses),
    Implementation("reference", reference, accepts_floats),
)
