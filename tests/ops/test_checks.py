"""What MAINSPRING_DEBUG=1 finds in a paged batch; and RoPE fused with the cache's write, on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mainspring import ops
from mainspring.errors import BackendError
from mainspring.ops import KVCache, Policy, TokenBatch, check_block_tables


def _cache(dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache.allocate(1, 6, 4, 2, 8, dtype, "cpu")


def _batch(cache: KVCache) -> TokenBatch:
    return TokenBatch.paged([3, 1], [7, 4], [[3, 1], [5]], cache)


def test_sequences_that_do_not_fill_the_stream_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = TokenBatch.packed([3, 2])
    monkeypatch.setenv("MAINSPRING_DEBUG", "1")
    for wrong in ([0, 3, 6], [0, 6, 5], [1, 3, 5]):
        with pytest.raises(BackendError, match="cu_seqlens must rise from 0 to 5"):
            replace(batch, cu_seqlens=torch.tensor(wrong, dtype=torch.int32))


def test_a_sound_batch_passes() -> None:
    batch = _batch(_cache())
    check_block_tables(batch)
    check_block_tables(TokenBatch.packed([3]))
    assert batch.slots is not None
    check_block_tables(replace(batch, slots=torch.full_like(batch.slots, -1)))  # nothing is written
    check_block_tables(replace(batch, slots=torch.zeros_like(batch.slots)))  # dummies, to the null block


@pytest.mark.parametrize(
    ("tables", "slots", "contexts", "message"),
    [
        ([[3, 6], [5, 0]], None, None, "sequence 0 names block 6 at 1; the cache has blocks 0 to 5"),
        ([[3, 1], [-1, 0]], None, None, "sequence 1 names block -1 at 0"),
        (None, [4, 24, 8, 9], None, "token 1 writes to slot 24; the cache has slots 0 to 23"),
        (None, [4, 5, 4, 9], None, "tokens 0 and 2 both write to slot 4"),
        (None, None, [9, 4], "sequence 0 has 9 keys; 2 blocks of 4 hold 0 to 8"),
        (None, None, [7], "2 sequences, contexts of 1"),
    ],
)
def test_what_points_outside_the_cache_is_named(
    tables: list[list[int]] | None,
    slots: list[int] | None,
    contexts: list[int] | None,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = _batch(_cache())
    changes = {"block_tables": tables, "slots": slots, "context_lens": contexts}
    changed = {name: torch.tensor(value) for name, value in changes.items() if value is not None}
    wrong = replace(batch, **changed)
    with pytest.raises(BackendError, match=message):
        check_block_tables(wrong)
    monkeypatch.setenv("MAINSPRING_DEBUG", "1")
    with pytest.raises(BackendError, match=message):
        replace(batch, **changed)
    monkeypatch.setenv("MAINSPRING_DEBUG", "0")
    replace(batch, **changed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("policy", [Policy(), Policy(backend="reference")], ids=str)
def test_rope_and_write_on_the_cpu(policy: Policy, dtype: torch.dtype) -> None:
    fp8 = dtype is torch.float8_e4m3fn
    cache, generator = _cache(dtype), torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(4, heads, 8, generator=generator).to(torch.bfloat16 if fp8 else dtype)
        for heads in (4, 2, 2)
    )
    batch = _batch(cache)
    assert batch.slots is not None
    for scales in (cache.k_scale, cache.v_scale):
        if scales is not None:
            scales[0].copy_(torch.tensor([0.5, 0.01]))
    slots = batch.slots.clone()
    slots[1] = -1
    batch = replace(batch, slots=slots)
    angles = ops.RopeAngles(batch.positions, torch.tensor([1.0, 0.3, 0.1, 0.01]))
    for tensor in (cache.k[0], cache.v[0]):
        tensor.view(torch.uint8).fill_(1)
    untouched = cache.k[0].view(torch.uint8).flatten(0, 1)[0].clone()
    expected_q, expected_k = ops.rope(q.clone(), k.clone(), angles, policy=policy)
    got = ops.rope_write_cache(q, k, v, angles, batch, layer=0, policy=policy)
    assert torch.equal(got, expected_q)
    for x, stored, scales in ((expected_k, cache.k[0], cache.k_scale), (v, cache.v[0], cache.v_scale)):
        rows = stored.flatten(0, 1)
        for token, slot in enumerate(batch.slots.tolist()):
            if slot < 0:
                continue
            value = rows[slot].float() if scales is None else rows[slot].float() * scales[0][:, None]
            limit = 448 * torch.ones(2) if scales is None else 448 * scales[0]
            kept = x[token].float().clamp(-limit[:, None], limit[:, None]) if fp8 else x[token].float()
            torch.testing.assert_close(value, kept, rtol=2**-4 if fp8 else 0, atol=2**-9 if fp8 else 0)
    assert torch.equal(cache.k[0].view(torch.uint8).flatten(0, 1)[0], untouched)


def test_a_batch_without_a_cache_is_refused() -> None:
    q = torch.randn(3, 2, 8)
    batch = TokenBatch.packed([3])
    angles = ops.RopeAngles(batch.positions, torch.ones(4))
    with pytest.raises(BackendError, match="no cache"):
        ops.rope_write_cache(q, q, q, angles, batch, layer=0)
    with pytest.raises(BackendError, match="no gradient"):
        ops.rope_write_cache(q.requires_grad_(), q, q, angles, _batch(_cache()), layer=0)
