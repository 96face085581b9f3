"""Causal attention over the packed token stream, with and without a paged KV cache.

The batch, not the caller, says where the keys are. Reference and backends alike reduce the keys in
chunks aligned at position 0, each chunk on its own, merged left to right in fp32; each has a size of chunk
of its own, KEY_CHUNK here ("Canonical reduction order" in docs/design.md).
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mainspring.errors import BackendError
from mainspring.ops import library
from mainspring.ops.batch import KVCache, TokenBatch
from mainspring.ops.canonical_attention import Backend, canonical_attention
from mainspring.ops.checks import check_heads, described, reject
from mainspring.ops.cpu import attention as cpu
from mainspring.ops.cpu.support import refuses
from mainspring.ops.cuda.support import CANONICAL_HEAD_SIZES
from mainspring.ops.cuda.support import refuses as cuda_refuses
from mainspring.ops.flash_attention import flash_attention
from mainspring.ops.gradient import kernel_with_formula_gradient
from mainspring.ops.packed_attention import MAX_LENGTH, packed_attention
from mainspring.ops.paged_attention import paged_attention
from mainspring.ops.policy import LOCKSTEP, Policy
from mainspring.ops.precision import accumulator
from mainspring.ops.registry import Call, Implementation, Operation, accepts_floats, any_requires_grad
from mainspring.ops.triton.support import refuses as triton_serves_not
from mainspring.ops.triton.support import refuses_fast_training as triton_refuses

KEY_CHUNK = 256
QUERY_TILE = 16


def attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    batch: TokenBatch,
    *,
    layer: int,
    scale: float,
    window: int | None = None,
    policy: Policy = LOCKSTEP,
) -> Tensor:
    """softmax(scale · q kᵀ + mask) v for every sequence of the batch.

    q: [T, Hq, D], k, v: [T, Hkv, D] (tokens may be strided) -> [T, Hq, D]. Hq is a multiple of Hkv:
    query head h reads key head h // (Hq / Hkv). The key at position j is seen from position p if
    j <= p, and with a window only if j > p - window. With a paged cache, k and v are written to layer
    `layer` of it first, and all of the sequence's cached keys are attended to; None for both says that they
    have been written (`norm_rope_write_cache`).

    Raises BackendError for shapes, dtypes, a device or an option that no backend takes, before anything is launched.
    """
    _check(q, k, v, batch, layer, scale, window)
    needs_grad = any_requires_grad(q, k, v)
    if batch.cache is not None and needs_grad:
        raise BackendError(
            "attention through a KV cache has no gradient; run the model under torch.no_grad()"
        )
    if library.is_traced():
        if batch.cache is not None:
            return library.paged_attention(q, k, v, batch, layer, scale, window, policy)
        if policy.numerics == "fast":
            return _flash(q, k, v, batch, layer, scale, window, policy)
        assert k is not None and v is not None  # checked above
        return library.packed_attention(q, k, v, batch, scale, window, policy)
    run = ATTENTION.select(q, policy, needs_grad, q.shape[-1])
    return run(q, k, v, batch, layer, scale, window, policy)


def _check(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    batch: TokenBatch,
    layer: int,
    scale: float,
    window: int | None,
) -> None:
    """What holds for every backend; each adds its own limits."""
    if (k is None) != (v is None) or (k is None and batch.cache is None):
        raise reject(
            "attention", "there must be keys and values, or with a cache that holds them already neither"
        )
    if k is not None and v is not None:
        check_heads("attention", q, k, v)
    keys = k
    if batch.cache is not None:
        if not 0 <= layer < len(batch.cache.k):
            raise reject("attention", f"layer {layer} of a cache with {len(batch.cache.k)} layers")
        keys = batch.cache.k[layer]
        if k is not None and k.shape[1:] != keys.shape[2:]:
            raise reject("attention", f"k {tuple(k.shape)} does not fit a cache of {tuple(keys.shape)}")
    assert keys is not None  # of the stream or of the cache
    if q.dim() != 3 or q.shape[2] != keys.shape[-1] or keys.shape[-2] == 0 or q.shape[1] % keys.shape[-2]:
        raise reject(
            "attention",
            f"q {described(q)} must be [T, Hq, D] with the D of the keys, and their {keys.shape[-2]} heads of "
            f"{keys.shape[-1]} divide the Hq",
        )
    if q.shape[0] != batch.num_tokens or q.device != batch.positions.device:
        raise reject(
            "attention",
            f"q {described(q)} is not the {batch.num_tokens} tokens of its batch on {batch.positions.device}",
        )
    if not scale > 0 or (window is not None and window < 1):
        raise reject(
            "attention",
            f"scale must be above 0, not {scale}, and window at least 1 key or None, not {window}",
        )


def reference(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    batch: TokenBatch,
    layer: int,
    scale: float,
    window: int | None,
    policy: Policy,
) -> Tensor:
    """The formula in PyTorch; sequence by sequence, except that "fast" batches sequences of equal shape."""
    if batch.cache is not None and batch.cache.k[layer].dtype is not q.dtype:
        raise reject(
            "attention", f"the reference has no cache of {batch.cache.k[layer].dtype} for q of {q.dtype}"
        )
    if batch.cache is not None and k is not None and v is not None:
        _write_cache(k, v, batch, layer, batch.cache)
    if policy.numerics == "fast":
        return _fast(q, k, v, batch, layer, scale, window)
    out = []
    for s, (queries, start) in enumerate(zip(q.split(batch.lengths), _starts(batch), strict=True)):
        keys, values = _keys_and_values(k, v, batch, layer, s)
        out.append(_canonical(queries, keys, values, start, scale, window))
    return torch.cat(out)


def _starts(batch: TokenBatch) -> list[int]:
    """Position of each sequence's first token in this stream."""
    return [context - n for n, context in zip(batch.lengths, batch.contexts, strict=True)]


def _write_cache(k: Tensor, v: Tensor, batch: TokenBatch, layer: int, cache: KVCache) -> None:
    assert batch.slots is not None  # TokenBatch.paged sets cache and slots together
    cache.k[layer].flatten(0, 1).index_copy_(0, batch.slots, k)
    cache.v[layer].flatten(0, 1).index_copy_(0, batch.slots, v)


def _keys_and_values(
    k: Tensor | None, v: Tensor | None, batch: TokenBatch, layer: int, s: int
) -> tuple[Tensor, Tensor]:
    """Sequence s's keys and values, [contexts[s], Hkv, D] each, from the stream or the cache."""
    if batch.cache is None or batch.block_tables is None:
        assert k is not None and v is not None  # checked by `attention`
        first = sum(batch.lengths[:s])
        return k[first : first + batch.lengths[s]], v[first : first + batch.lengths[s]]
    blocks = batch.block_tables[s, : -(-batch.contexts[s] // batch.cache.block_size)].long()
    context = batch.contexts[s]
    return (
        batch.cache.k[layer][blocks].flatten(0, 1)[:context],
        batch.cache.v[layer][blocks].flatten(0, 1)[:context],
    )


def _canonical(q: Tensor, k: Tensor, v: Tensor, start: int, scale: float, window: int | None) -> Tensor:
    """One sequence, in tiles of one shape that are aligned at position 0.

    A query at position p is always row p % QUERY_TILE of its tile and a key always column j % KEY_CHUNK
    of its chunk, so chunked prefill and decode repeat the very same matrix products.
    """
    n, heads, dim = q.shape
    keys = k.shape[0]
    group = heads // k.shape[1]
    lead = start % QUERY_TILE
    wide = accumulator(q.dtype)
    floor = torch.finfo(wide).min
    padded_q = F.pad(q.to(wide), (0, 0, 0, 0, lead, -(lead + n) % QUERY_TILE))
    pad_k = (0, 0, 0, 0, 0, -keys % KEY_CHUNK)
    padded_k = F.pad(k.to(wide), pad_k).repeat_interleave(group, dim=1).transpose(0, 1)
    padded_v = F.pad(v.to(wide), pad_k).repeat_interleave(group, dim=1).transpose(0, 1)
    out = []
    for tile, tile_q in enumerate(padded_q.split(QUERY_TILE)):
        first = start - lead + tile * QUERY_TILE
        rows = torch.arange(first, first + QUERY_TILE, device=q.device)[:, None]
        low = 0 if window is None else max(0, first - window + 1) // KEY_CHUNK * KEY_CHUNK
        maximum = torch.full((heads, QUERY_TILE, 1), -torch.inf, dtype=wide, device=q.device)
        total = torch.zeros_like(maximum)
        acc = torch.zeros(heads, QUERY_TILE, dim, dtype=wide, device=q.device)
        for chunk in range(low, min(keys, first + QUERY_TILE), KEY_CHUNK):
            columns = torch.arange(chunk, chunk + KEY_CHUNK, device=q.device)[None, :]
            seen = columns <= rows
            if window is not None:
                seen = seen & (columns > rows - window)
            scores = tile_q.transpose(0, 1) @ padded_k[:, chunk : chunk + KEY_CHUNK].transpose(1, 2) * scale
            scores = scores.masked_fill(~seen, -torch.inf)
            chunk_max = scores.amax(-1, keepdim=True)
            # A row that sees nothing of this chunk must leave the running sums untouched, bit for bit.
            weights = torch.exp(scores - chunk_max.clamp_min(floor))
            new_max = torch.maximum(maximum, chunk_max)
            safe_max = new_max.clamp_min(floor)
            old_scale, chunk_scale = torch.exp(maximum - safe_max), torch.exp(chunk_max - safe_max)
            total = total * old_scale + weights.sum(-1, keepdim=True) * chunk_scale
            acc = acc * old_scale + (weights @ padded_v[:, chunk : chunk + KEY_CHUNK]) * chunk_scale
            maximum = new_max
        out.append((acc / total).transpose(0, 1))
    return torch.cat(out)[lead : lead + n].to(q.dtype)


def _fast(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    batch: TokenBatch,
    layer: int,
    scale: float,
    window: int | None,
) -> Tensor:
    """torch's scaled_dot_product_attention; sequences of equal (new tokens, keys) share a call."""
    if k is not None and v is not None and _trains_faster_by_products(q, k, v, batch):
        return packed_attention(q, k, v, batch.lengths, scale, window)
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for s, shape in enumerate(zip(batch.lengths, batch.contexts, strict=True)):
        groups[shape].append(s)
    if len(groups) == 1 and batch.cache is None and k is not None and v is not None:
        count, n = len(batch.lengths), batch.lengths[0]
        q, k, v = (x.unflatten(0, (count, n)).transpose(1, 2) for x in (q, k, v))
        return _sdpa(q, k, v, n, n, scale, window).transpose(1, 2).flatten(0, 1)
    queries = q.split(batch.lengths)
    out: list[Tensor] = [q] * len(queries)
    for (n, context), members in groups.items():
        pairs = [_keys_and_values(k, v, batch, layer, s) for s in members]
        result = _sdpa(
            torch.stack([queries[s] for s in members]).transpose(1, 2),
            torch.stack([pair[0] for pair in pairs]).transpose(1, 2),
            torch.stack([pair[1] for pair in pairs]).transpose(1, 2),
            n,
            context,
            scale,
            window,
        )
        for s, piece in zip(members, result.transpose(1, 2).unbind(0), strict=True):
            out[s] = piece
    return torch.cat(out)


def _trains_faster_by_products(q: Tensor, k: Tensor, v: Tensor, batch: TokenBatch) -> bool:
    return (
        q.device.type == "cpu"
        and q.dtype == torch.bfloat16
        and batch.cache is None
        and max(batch.lengths) <= MAX_LENGTH
        and any_requires_grad(q, k, v)
    )


def _sdpa(q: Tensor, k: Tensor, v: Tensor, n: int, context: int, scale: float, window: int | None) -> Tensor:
    """q: [B, Hq, n, D], k, v: [B, Hkv, context, D]; the queries are the last n positions."""
    grouped = q.shape[1] != k.shape[1]
    if window is not None and window >= context:
        window = None
    if window is None and (n == context or n == 1):
        return F.scaled_dot_product_attention(q, k, v, is_causal=n > 1, scale=scale, enable_gqa=grouped)
    rows = torch.arange(context - n, context, device=q.device)[:, None]
    columns = torch.arange(context, device=q.device)[None, :]
    mask = columns <= rows
    if window is not None:
        mask &= columns > rows - window
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)


def _cpu(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    batch: TokenBatch,
    layer: int,
    scale: float,
    window: int | None,
    policy: Policy,
) -> Tensor:
    if batch.cache is not None and batch.slots is not None:
        keys, values = batch.cache.k[layer], batch.cache.v[layer]
        if k is not None and v is not None:
            cpu.write_cache(k, v, batch.slots, keys, values)
        return cpu.attention(
            q, keys, values, batch.cu_seqlens, batch.context_lens, batch.block_tables, scale, window or 0
        )

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return cpu.attention(q, k, v, batch.cu_seqlens, batch.context_lens, None, scale, window or 0)

    assert k is not None and v is not None  # checked by `attention`
    if not any_requires_grad(q, k, v):
        return kernel(q, k, v)
    result: Tensor = kernel_with_formula_gradient(
        kernel, lambda q, k, v: _fast(q, k, v, batch, layer, scale, window), q, k, v
    )
    return result


def _flash(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    batch: TokenBatch,
    layer: int,
    scale: float,
    window: int | None,
    policy: Policy,
) -> Tensor:
    """Whole sequences by the operator with a backward pass of its own; with a cache as in lockstep."""
    if batch.cache is not None:
        return paged_attention(q, k, v, batch, layer, scale, window, policy)
    assert k is not None and v is not None  # checked by `attention`
    longest = max(batch.lengths)
    backend = None if policy.backend == "flash" else policy.backend
    # As PyTorch's own operations do: a run that was cut is resumed bit for bit only if gradients have one order.
    deterministic = torch.are_deterministic_algorithms_enabled()
    return flash_attention(
        q, k, v, batch.cu_seqlens, batch.cu_seqlens, max_q=longest, max_k=longest, scale=scale, window=window,
        deterministic=deterministic, policy=Policy("fast", backend),
    )  # fmt: skip


def _refuses_flash(call: Call) -> str | None:
    if call.policy.numerics == "lockstep":
        return "its sums are in free order"
    if call.device_type != "cuda" or call.dtype not in (torch.bfloat16, torch.float16):
        return f"serves bfloat16 and float16 on CUDA devices, not {call.dtype} on {call.device_type}"
    return triton_serves_not(call)


def _kernels(
    backend: Backend,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    batch: TokenBatch,
    layer: int,
    scale: float,
    window: int | None,
    policy: Policy,
) -> Tensor:
    if batch.cache is not None:
        return paged_attention(q, k, v, batch, layer, scale, window, policy)
    assert k is not None and v is not None  # checked by `attention`
    return canonical_attention(q, k, v, batch, scale, window, backend)


def _refuses_cuda(call: Call) -> str | None:
    if call.size is not None and call.size not in CANONICAL_HEAD_SIZES:
        return (
            f"has head sizes {', '.join(map(str, CANONICAL_HEAD_SIZES))} in canonical order, not {call.size}"
        )
    return cuda_refuses(call)


def _refuses_cpu(call: Call) -> str | None:
    if call.size is not None and (call.size % 8 or call.size > 256):
        return f"has head sizes that are multiples of 8 up to 256, not {call.size}"
    return refuses(call)


ATTENTION = Operation(
    "attention",
    Implementation("cpu", _cpu, _refuses_cpu),
    Implementation("flash", _flash, _refuses_flash),
    Implementation("cuda", partial(_kernels, "cuda"), _refuses_cuda),
    Implementation("triton", partial(_kernels, "triton"), triton_refuses),
    Implementation("reference", reference, accepts_floats),
)
