"""The CPU kernels that treat each row alone: RMSNorm, RoPE, SwiGLU, log-probabilities."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mainspring.errors import BackendError
from mainspring.ops.cpu.log_probs import logsumexp, token_log_probs
from mainspring.ops.cpu.norm import add_rms_norm, rms_norm
from mainspring.ops.cpu.rope import rope_, rope_angles
from mainspring.ops.cpu.swiglu import swiglu
from support.cpu_kernels import (
    DTYPES,
    assert_as_exact_as_torch,
    assert_same_bits,
    random_tensor,
    requires_kernels,
    threads,
)
from support.memory import in_poisoned_memory

pytestmark = [requires_kernels, in_poisoned_memory]

seeds = st.integers(0, 2**31)
dtypes = st.sampled_from(DTYPES)
rows = st.integers(0, 30)
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def huggingface_norm(x: Tensor, weight: Tensor, eps: float, wide: torch.dtype) -> Tensor:
    """LlamaRMSNorm: normalised in `wide`, rounded to x's dtype, then scaled in x's dtype."""
    v = x.to(wide)
    return weight * (v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


@settings(deadline=None, max_examples=40)
@given(seeds, rows, st.integers(1, 300), dtypes, st.sampled_from([1e-3, 1.0, 1e3]))
def test_rms_norm_is_as_exact_as_torch(seed: int, m: int, h: int, dtype: torch.dtype, scale: float) -> None:
    x, weight = random_tensor(seed, m, h, dtype=dtype, scale=scale), random_tensor(seed + 1, h, dtype=dtype)
    exact = huggingface_norm(x.double(), weight.double(), 1e-5, torch.float64)
    peer = huggingface_norm(x, weight, 1e-5, torch.float32)
    assert_as_exact_as_torch(rms_norm(x, weight, 1e-5), peer, exact, roundings=3)


@both_dtypes
def test_rms_norm_of_bfloat16_rounds_where_llama_does(dtype: torch.dtype) -> None:
    """Rounding once instead of twice would differ in about a third of the elements."""
    x, weight = random_tensor(0, 64, 576, dtype=dtype), random_tensor(1, 576, dtype=dtype)
    got, expected = rms_norm(x, weight, 1e-6), huggingface_norm(x, weight, 1e-6, torch.float32)
    same = (got == expected).double().mean()
    assert same > (0.995 if dtype is torch.bfloat16 else 0.4)
    torch.testing.assert_close(got, expected, rtol=0.008 if dtype is torch.bfloat16 else 1e-6, atol=1e-7)


@settings(deadline=None, max_examples=30)
@given(seeds, rows, st.integers(1, 300), dtypes)
def test_add_rms_norm_is_addition_then_norm(seed: int, m: int, h: int, dtype: torch.dtype) -> None:
    x, residual = random_tensor(seed, m, h, dtype=dtype), random_tensor(seed + 1, m, h, dtype=dtype)
    weight = random_tensor(seed + 2, h, dtype=dtype)
    normed, total = add_rms_norm(x, residual, weight, 1e-5)
    assert_same_bits(total, x + residual)
    assert_same_bits(normed, rms_norm(x + residual, weight, 1e-5))


@both_dtypes
def test_norm_takes_the_heads_of_a_strided_view(dtype: torch.dtype) -> None:
    fused, weight = random_tensor(0, 7, 10, 32, dtype=dtype), random_tensor(1, 32, dtype=dtype)
    view = fused[:, 2:6]
    assert_same_bits(rms_norm(view, weight, 1e-6), rms_norm(view.contiguous(), weight, 1e-6))
    assert_same_bits(rms_norm(view, weight, 1e-6)[3], rms_norm(fused[3, 2:6], weight, 1e-6))
    wide = random_tensor(2, 9, 96, dtype=dtype)
    assert_same_bits(
        rms_norm(wide[:, 32:64], weight, 1e-6), rms_norm(wide[:, 32:64].contiguous(), weight, 1e-6)
    )


@settings(deadline=None, max_examples=30)
@given(seeds, rows, st.integers(1, 200), dtypes, st.sampled_from([0.1, 1.0, 30.0, 1000.0]))
def test_swiglu_is_as_exact_as_torch(seed: int, m: int, i: int, dtype: torch.dtype, scale: float) -> None:
    x = random_tensor(seed, m, 2 * i, dtype=dtype, scale=scale)
    peer = F.silu(x[:, :i]) * x[:, i:]
    exact = F.silu(x[:, :i].double()) * x[:, i:].double()
    assert_as_exact_as_torch(swiglu(x), peer, exact, roundings=3)


def test_swiglu_of_extreme_gates() -> None:
    gate = torch.tensor([[0.0, -0.0, 100.0, -100.0, 3e38, -3e38, torch.nan]])
    got = swiglu(torch.cat((gate, torch.ones_like(gate)), -1))
    torch.testing.assert_close(got, F.silu(gate), equal_nan=True, rtol=1e-6, atol=1e-37)


@settings(deadline=None, max_examples=30)
@given(seeds, rows, st.sampled_from([2, 8, 34, 64, 128]), st.sampled_from([1.0, 1.25]))
def test_rope_angles_are_correct_to_a_rounding(seed: int, t: int, d: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randint(0, 2**20, (t,), generator=generator)
    inv_freq = 10000.0 ** (-torch.arange(0, d, 2) / d)
    cos, sin = rope_angles(positions, inv_freq, scale)
    angle = (positions.float()[:, None] * inv_freq).double()
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(cos.double(), angle.cos() * scale, rtol=eps, atol=1e-30)
    torch.testing.assert_close(sin.double(), angle.sin() * scale, rtol=eps, atol=1e-30)


@settings(deadline=None, max_examples=30)
@given(seeds, rows, st.sampled_from([(1, 1), (4, 2), (9, 3)]), st.sampled_from([2, 16, 34, 64, 128]), dtypes)
def test_rope_is_as_exact_as_torch(
    seed: int, t: int, heads: tuple[int, int], d: int, dtype: torch.dtype
) -> None:
    fused = random_tensor(seed, t, sum(heads), d, dtype=dtype)
    cos, sin = rope_angles(torch.arange(t) * 37, 10000.0 ** (-torch.arange(0, d, 2) / d))

    def rotated(wide: torch.dtype, store: torch.dtype) -> Tensor:
        x = fused.to(wide)
        half = torch.cat((-x[..., d // 2 :], x[..., : d // 2]), -1)
        c, s = (torch.cat((a, a), -1)[:, None].to(wide) for a in (cos, sin))
        return (x * c + half * s).to(store)

    exact, peer = rotated(torch.float64, torch.float64), rotated(torch.float32, dtype)
    rope_(fused[:, : heads[0]], fused[:, heads[0] :], cos, sin)
    assert_as_exact_as_torch(fused, peer, exact, roundings=3)


@settings(deadline=None, max_examples=40)
@given(seeds, rows, st.integers(1, 3000), st.sampled_from([0.1, 1.0, 50.0]), st.sampled_from([0.3, 1.0, 1.7]))
def test_log_probs_are_as_exact_as_torch(seed: int, m: int, v: int, scale: float, temperature: float) -> None:
    logits = random_tensor(seed, m, v, scale=scale)
    targets = torch.randint(v, (m,), generator=torch.Generator().manual_seed(seed))
    exact = (logits.double() / temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    peer = (logits / temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    got, lse = token_log_probs(logits, targets, temperature), logsumexp(logits, temperature)
    # The difference of two numbers as large as the largest logit cannot keep more digits than they have.
    largest = logits.abs().max().item() / temperature if m else 0.0
    slack = 2 * torch.finfo(torch.float32).eps * largest / max(1e-30, exact.abs().max().item() if m else 1.0)
    assert_as_exact_as_torch(got, peer, exact, roundings=4 + 2 * slack / torch.finfo(torch.float32).eps)
    torch.testing.assert_close(
        lse.double(), (logits.double() / temperature).logsumexp(-1), rtol=3e-7, atol=3e-6
    )


def test_log_probs_of_extreme_logits() -> None:
    inf = float("inf")
    logits = torch.tensor(
        [[1e38, -1e38, 0.0], [-inf, 2.0, -inf], [-inf, -inf, -inf], [inf, 0.0, 0.0], [torch.nan, 0, 0]]
    )
    assert logsumexp(logits)[:4].tolist() == [float(torch.tensor(1e38)), 2.0, -inf, inf]
    assert math.isnan(logsumexp(logits)[4])
    assert token_log_probs(logits[:2], torch.tensor([0, 1])).tolist() == [0.0, 0.0]
    assert logsumexp(torch.tensor([[-3.5]])).tolist() == [-3.5]


@both_dtypes
def test_bits_do_not_depend_on_the_batch_or_the_threads(dtype: torch.dtype) -> None:
    m, h = 700, 200
    x, weight = random_tensor(0, m, h, dtype=dtype), random_tensor(1, h, dtype=dtype)
    logits, targets = random_tensor(2, m, 513), torch.arange(m) % 513
    with threads(1):
        alone = (
            torch.cat([rms_norm(x[i : i + 1], weight, 1e-6) for i in range(m)]),
            torch.cat([swiglu(x[i : i + 1]) for i in range(m)]),
            torch.cat([token_log_probs(logits[i : i + 1], targets[i : i + 1], 0.7) for i in range(m)]),
        )
    for count in (1, 2, 3):
        with threads(count):
            together = rms_norm(x, weight, 1e-6), swiglu(x), token_log_probs(logits, targets, 0.7)
        for a, b in zip(together, alone, strict=True):
            assert_same_bits(a, b)


def test_refuses_what_it_cannot_read() -> None:
    x, weight = torch.zeros(2, 8), torch.zeros(8)
    with pytest.raises(BackendError, match="weight"):
        rms_norm(x, weight[:4], 1e-6)
    with pytest.raises(BackendError, match="dimensions"):
        rms_norm(x[0], weight, 1e-6)
    with pytest.raises(BackendError, match="residual"):
        add_rms_norm(x, x[:1], weight, 1e-6)
    with pytest.raises(BackendError, match="gate_up"):
        swiglu(torch.zeros(2, 7))
    with pytest.raises(BackendError, match="cos and sin"):
        rope_(torch.zeros(2, 1, 8), torch.zeros(2, 1, 8), torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(BackendError, match="positions"):
        rope_angles(torch.zeros(2), torch.zeros(4))
    with pytest.raises(BackendError, match="float32"):
        logsumexp(x.bfloat16())
    with pytest.raises(BackendError, match="temperature"):
        logsumexp(x, 0.0)
    with pytest.raises(BackendError, match="outside the vocabulary of 8"):
        token_log_probs(x, torch.tensor([0, 8]))
