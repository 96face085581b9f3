"""Triton's rotary embedding: its sines and cosines, its rotation and gradient, and its writes to a paged cache."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mainspring.errors import BackendError
from mainspring.ops import (
    HeadNorms,
    KVCache,
    Policy,
    RopeAngles,
    TokenBatch,
    norm_rope_write_cache,
    rms_norm,
    rope,
    rope_write_cache,
)
from support.cpu_kernels import assert_as_exact_as_torch
from support.memory import in_poisoned_memory
from support.triton_kernels import (
    DEVICE,
    DTYPES,
    EXAMPLES,
    INTERPRETED,
    assert_same_bits,
    needs_triton,
    random_tensor,
)

pytestmark = [*needs_triton, in_poisoned_memory]

TRITON = Policy("lockstep", "triton")


def _cos_and_sin(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """What the kernel turns by: it rotates (1, 0)."""
    one = torch.zeros(positions.shape[0], 1, 2 * inv_freq.shape[0], device=DEVICE)
    one[..., : inv_freq.shape[0]] = 1
    turned, _ = rope(one, one.clone(), RopeAngles(positions, inv_freq), policy=TRITON)
    cos, sin = turned[:, 0].chunk(2, -1)
    return cos, sin


@pytest.mark.parametrize("longest", [1000, 1 << 20])
@pytest.mark.parametrize("base", [1e4, 1e6])
def test_sines_and_cosines_within_two_units_in_the_last_place(base: float, longest: int) -> None:
    count = 64 if INTERPRETED else 65536
    generator = torch.Generator().manual_seed(longest)
    positions = torch.randint(0, longest + 1, (count,), generator=generator).to(DEVICE)
    positions[:3] = torch.tensor([0, 1, longest], device=DEVICE)
    inv_freq = base ** -(torch.arange(64, device=DEVICE) / 64)
    angle = (positions.float()[:, None] * inv_freq).double()
    for got, exact in zip(_cos_and_sin(positions, inv_freq), (angle.cos(), angle.sin()), strict=True):
        nearest = exact.float().abs().clamp_min(1e-30)
        unit = torch.nextafter(nearest, torch.full_like(nearest, torch.inf)) - nearest
        assert float(((got.double() - exact).abs() / unit.double()).max()) < 2


@settings(max_examples=2 * EXAMPLES, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    tokens=st.sampled_from([1, 2, 15, 130]),
    heads=st.sampled_from([(1, 1), (9, 3), (4, 2)]),
    half=st.sampled_from([4, 8, 12, 32]),
    rest=st.sampled_from([0, 8, 10]),
    interleaved=st.booleans(),
    rowed=st.booleans(),
    scale=st.sampled_from([1.0, 1.1]),
    seed=st.integers(0, 99),
)
def test_rope_and_its_gradient(
    dtype: torch.dtype,
    tokens: int,
    heads: tuple[int, int],
    half: int,
    rest: int,
    interleaved: bool,
    rowed: bool,
    scale: float,
    seed: int,
) -> None:
    from mainspring.ops.rope import _rotate

    fused = random_tensor(seed, tokens, sum(heads) + heads[1], 2 * half + rest, dtype=dtype)
    q, k, _ = fused.split((*heads, heads[1]), 1)
    positions = torch.arange(tokens, device=DEVICE) * 37
    inv_freq = 10000.0 ** -(torch.arange(half, device=DEVICE) / half)
    rows = None
    if rowed:
        inv_freq = torch.stack((inv_freq, inv_freq / 3))
        rows = torch.arange(tokens, device=DEVICE) % 2
    angles = RopeAngles(positions, inv_freq, rows, scale)
    angle = (positions.float()[:, None] * (inv_freq if rows is None else inv_freq[rows])).double()

    def run(q: Tensor, k: Tensor, ours: bool) -> list[Tensor]:
        a, b = q.detach().requires_grad_(), k.detach().requires_grad_()
        if ours:
            out = rope(a, b, angles, interleaved=interleaved, policy=TRITON)
        else:
            wide = torch.float64 if q.dtype is torch.float64 else torch.float32
            cos, sin = ((f(angle) * scale).to(wide) for f in (torch.cos, torch.sin))
            out = _rotate(a, cos, sin, interleaved), _rotate(b, cos, sin, interleaved)
        grads = torch.autograd.grad(out, (a, b), [torch.ones_like(t) * 0.7 for t in out])
        return [*(t.detach() for t in out), *grads]

    ours = run(q, k, True)
    for a, b, c in zip(ours, run(q, k, False), run(q.double(), k.double(), False), strict=True):
        assert_as_exact_as_torch(a, b, c, roundings=6 if dtype is torch.float32 else 2)
    part = slice(tokens - 1, tokens)
    alone = RopeAngles(positions[part], inv_freq, None if rows is None else rows[part], scale)
    one = rope(q[part].clone(), k[part].clone(), alone, interleaved=interleaved, policy=TRITON)
    assert_same_bits(one[0], ours[0][part])
    in_place = rope(q, k, angles, interleaved=interleaved, policy=TRITON)
    assert in_place[0].data_ptr() == q.data_ptr()
    assert_same_bits(in_place[0], ours[0])
    assert_same_bits(in_place[1], ours[1])


def test_bad_input_is_refused() -> None:
    from mainspring.ops.triton.rope import rope as triton_rope

    q, positions, inv_freq = (
        random_tensor(0, 3, 2, 8),
        torch.arange(3, device=DEVICE),
        torch.ones(4, device=DEVICE),
    )
    with pytest.raises(BackendError, match="does not fit q"):
        triton_rope(q, q[:2], positions, inv_freq)
    with pytest.raises(BackendError, match="positions must be"):
        triton_rope(q, q, positions.float(), inv_freq)
    with pytest.raises(BackendError, match="inv_freq must be"):
        triton_rope(q, q, positions, inv_freq.double())
    with pytest.raises(BackendError, match="a head has 8"):
        triton_rope(q, q, positions, torch.ones(5, device=DEVICE))
    with pytest.raises(BackendError, match="rows must be"):
        triton_rope(q, q, positions, inv_freq[None], positions[:2])


@settings(max_examples=2 * EXAMPLES, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    tokens=st.sampled_from([1, 5, 33]),
    heads=st.sampled_from([(1, 1), (9, 3), (4, 2)]),
    half=st.sampled_from([4, 12, 32]),
    rest=st.sampled_from([0, 10]),
    interleaved=st.booleans(),
    fp8=st.just(False) if INTERPRETED else st.booleans(),  # its conversion loses a carry: 1.97 becomes 1
    seed=st.integers(0, 99),
)
def test_rope_fused_with_the_cache_writes_the_bits_of_rope_then_write(
    dtype: torch.dtype,
    tokens: int,
    heads: tuple[int, int],
    half: int,
    rest: int,
    interleaved: bool,
    fp8: bool,
    seed: int,
) -> None:
    d, size, kv_heads = 2 * half + rest, 4, heads[1]
    qkv = random_tensor(seed, tokens, sum(heads) + kv_heads, d, dtype=dtype, scale=3.0)
    qkv[0, -1, 0] = 30000.0  # beyond what fp8 holds
    q, k, v = qkv.split((*heads, kv_heads), 1)
    angles = RopeAngles(
        torch.arange(tokens, device=DEVICE) * 37, 10000.0 ** -(torch.arange(half, device=DEVICE) / half)
    )
    blocks = -(-tokens // size) + 2
    slots = torch.randperm(blocks * size, generator=torch.Generator().manual_seed(seed))[:tokens].to(DEVICE)
    slots[1::5] = -1
    cache_dtype = torch.float8_e4m3fn if fp8 else dtype
    caches = []
    for _ in range(2):
        cache = KVCache.allocate(1, blocks, size, kv_heads, d, cache_dtype, DEVICE)
        for tensor in (*cache.k, *cache.v):
            tensor.view(torch.uint8).fill_(0x7B)
        for scales in (cache.k_scale, cache.v_scale):
            assert (scales is not None) == fp8
            if scales is not None:
                scales[0].copy_(torch.linspace(0.013, 0.7, kv_heads))
        caches.append(cache)
    rotated, expected_k = rope(q.clone(), k.clone(), angles, interleaved=interleaved, policy=TRITON)
    for x, cache, scales in (
        (expected_k, caches[1].k[0], caches[1].k_scale),
        (v, caches[1].v[0], caches[1].v_scale),
    ):
        stored = x
        if scales is not None:
            stored = (x.float() / scales[0][:, None]).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
        rows = cache.view(torch.uint8).flatten(0, 1)
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                rows[slot] = stored[token].contiguous().view(torch.uint8)
    got = rope_write_cache(
        q, k, v, angles, _batch(caches[0], slots), layer=0, interleaved=interleaved, policy=TRITON
    )
    assert got.data_ptr() == q.data_ptr()
    assert_same_bits(got, rotated)
    for a, b in zip((*caches[0].k, *caches[0].v), (*caches[1].k, *caches[1].v), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    tokens=st.sampled_from([1, 2, 5] if INTERPRETED else [1, 2, 19, 130]),
    heads=st.sampled_from([(1, 1), (9, 3), (16, 8), (40, 20)]),
    d=st.sampled_from([8, 16, 64, 96, 128, 256]),
    rowed=st.booleans(),
    fp8=st.just(False) if INTERPRETED else st.booleans(),
    seed=st.integers(0, 99),
)
def test_norms_fused_with_rope_and_the_cache_have_the_bits_of_one_after_the_other(
    dtype: torch.dtype, tokens: int, heads: tuple[int, int], d: int, rowed: bool, fp8: bool, seed: int
) -> None:
    size, kv_heads = 4, heads[1]
    q, k, v = random_tensor(seed, tokens, sum(heads) + kv_heads, d, dtype=dtype, scale=3.0).split(
        (*heads, kv_heads), 1
    )
    norms = HeadNorms(*(1 + random_tensor(seed + i, d, dtype=dtype, scale=0.2) for i in (1, 2)), eps=1e-6)
    inv_freq = 10000.0 ** -(torch.arange(d // 2, device=DEVICE) / (d // 2))
    rows = torch.arange(tokens, device=DEVICE) % 3 if rowed else None
    if rowed:
        inv_freq = torch.stack([inv_freq, inv_freq / 2, inv_freq / 3])
    angles = RopeAngles(torch.arange(tokens, device=DEVICE) * 37, inv_freq, rows, 1.1)
    blocks = -(-tokens // size) + 2
    slots = torch.randperm(blocks * size, generator=torch.Generator().manual_seed(seed))[:tokens].to(DEVICE)
    slots[1::5] = -1
    caches = []
    for _ in range(2):
        cache = KVCache.allocate(1, blocks, size, kv_heads, d, torch.float8_e4m3fn if fp8 else dtype, DEVICE)
        for tensor in (*cache.k, *cache.v):
            tensor.view(torch.uint8).fill_(0x7B)
        caches.append(cache)
    normed = (rms_norm(x, weight, norms.eps, policy=TRITON) for x, weight in ((q, norms.q), (k, norms.k)))
    expected = rope_write_cache(*normed, v, angles, _batch(caches[1], slots), layer=0, policy=TRITON)
    got = norm_rope_write_cache(q, k, v, norms, angles, _batch(caches[0], slots), layer=0, policy=TRITON)
    pairs = zip((*caches[0].k, *caches[0].v), (*caches[1].k, *caches[1].v), strict=True)
    if not fp8:
        assert_same_bits(got, expected)
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)
        return
    # Its stores may let the compiler arrange a row's sum otherwise; a cache of fp8 promises no bits.
    torch.testing.assert_close(got, expected, rtol=2**-7, atol=2**-7)
    for a, b in pairs:
        rows = [x.flatten(0, 1)[slots[slots >= 0]].float() for x in (a, b)]
        torch.testing.assert_close(*rows, rtol=2**-3, atol=2**-6)


def test_a_cache_of_fp8_holds_the_value_over_its_heads_scale() -> None:
    scales = torch.tensor([0.5, 8.0], device=DEVICE)
    exact = torch.tensor([0.0, 1.0, -1.75, 448.0, 2.0**-9, -0.125, 36.0, 13.0], device=DEVICE)
    k = (exact * scales[:, None]).expand(3, 2, 8).contiguous()
    v = -k
    v[0, 0, 0], v[0, 0, 1], v[0, 1, 0] = torch.nan, 1e6, -torch.inf
    cache = KVCache.allocate(1, 3, 4, 2, 8, torch.float8_e4m3fn, DEVICE)
    assert cache.k_scale is not None
    assert cache.v_scale is not None
    cache.k_scale[0].copy_(scales)
    cache.v_scale[0].copy_(scales)
    slots = torch.tensor([5, -1, 11], device=DEVICE)
    angles = RopeAngles(torch.zeros(3, dtype=torch.int64, device=DEVICE), torch.ones(4, device=DEVICE))
    rope_write_cache(k.clone(), k, v, angles, _batch(cache, slots), layer=0, policy=TRITON)
    keys, values = (x[0].flatten(0, 1)[[5, 11]].float() * scales[:, None] for x in (cache.k, cache.v))
    assert torch.equal(keys, k[[0, 2]])
    assert torch.equal(values[1], v[2])
    assert INTERPRETED or values[0, 0, 0].isnan()  # the interpreter's conversion makes a number of it
    assert values[0, 0, 1] == 448 * 0.5
    assert values[0, 1, 0] == -448 * 8.0
    assert torch.equal(values[0, 0, 2:], v[0, 0, 2:])


def _batch(cache: KVCache, slots: Tensor) -> TokenBatch:
    tokens = slots.shape[0]
    contexts = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    return TokenBatch(
        positions=torch.arange(tokens, device=DEVICE),
        cu_seqlens=torch.tensor([0, tokens], dtype=torch.int32, device=DEVICE),
        context_lens=contexts,
        lengths=(tokens,),
        contexts=(tokens,),
        rope_lengths=(tokens,),
        cache=cache,
        slots=slots,
        block_tables=torch.zeros(1, 1, dtype=torch.int32, device=DEVICE),
    )


def test_caches_that_do_not_fit_are_refused() -> None:
    from mainspring.ops.triton.rope_cache import rope_write_cache as fused

    q, positions, inv_freq = (
        random_tensor(0, 3, 2, 8),
        torch.arange(3, device=DEVICE),
        torch.ones(4, device=DEVICE),
    )
    slots, cache, scales = (
        positions.clone(),
        torch.zeros(2, 4, 2, 8, device=DEVICE),
        torch.ones(2, device=DEVICE),
    )
    with pytest.raises(BackendError, match="v torch"):
        fused(q, q, q[:2], slots, cache, cache, positions, inv_freq)
    with pytest.raises(BackendError, match="slots must be"):
        fused(q, q, q, slots.int(), cache, cache, positions, inv_freq)
    with pytest.raises(BackendError, match="hold heads of"):
        fused(q, q, q, slots, cache[:, :, :1], cache, positions, inv_freq)
    with pytest.raises(BackendError, match="caches must both be"):
        fused(q, q, q, slots, cache.half(), cache.half(), positions, inv_freq)
    with pytest.raises(BackendError, match="has no k_scale"):
        fused(q, q, q, slots, cache, cache, positions, inv_freq, k_scale=scales, v_scale=scales)
    narrow = cache.to(torch.float8_e4m3fn)
    with pytest.raises(BackendError, match="needs k_scale"):
        fused(q, q, q, slots, narrow, narrow, positions, inv_freq)
    with pytest.raises(BackendError, match=r"must be \[2\] float32"):
        fused(q, q, q, slots, narrow, narrow, positions, inv_freq, k_scale=scales[:1], v_scale=scales)
