"""Triton's way from the QKV projection to attention: the bits of its parts, and one gradient for all of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mainspring.errors import BackendError
from mainspring.ops import HeadNorms, Policy, RopeAngles, qkv_heads
from mainspring.ops.qkv_heads import composed
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
REFERENCE = Policy("fast", "reference")


def _angles(tokens: int, d: int, rowed: bool, scale: float) -> RopeAngles:
    inv_freq = 10000.0 ** -(torch.arange(d // 2, device=DEVICE) / (d // 2))
    rows = None
    if rowed:
        inv_freq = torch.stack((inv_freq, inv_freq / 3))
        rows = torch.arange(tokens, device=DEVICE) % 2
    return RopeAngles(torch.arange(tokens, device=DEVICE) * 37, inv_freq, rows, scale)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    tokens=st.sampled_from([1, 2, 5] if INTERPRETED else [1, 2, 21, 1300]),
    heads=st.sampled_from([(1, 1), (9, 3), (4, 2)]),
    d=st.sampled_from([16, 48, 64]),
    normed=st.booleans(),
    rowed=st.booleans(),
    scale=st.sampled_from([1.0, 1.1]),
    seed=st.integers(0, 99),
)
def test_heads_and_their_one_gradient(
    dtype: torch.dtype,
    tokens: int,
    heads: tuple[int, int],
    d: int,
    normed: bool,
    rowed: bool,
    scale: float,
    seed: int,
) -> None:
    fused = random_tensor(seed, tokens, heads[0] + 2 * heads[1], d, dtype=dtype)
    weights = [1 + random_tensor(seed + n, d, dtype=dtype, scale=0.3) for n in (1, 2)]
    grads = [random_tensor(seed + 3 + n, tokens, h, d, dtype=dtype) for n, h in enumerate((*heads, heads[1]))]
    angles = _angles(tokens, d, rowed, scale)

    def run(kind: torch.dtype, policy: Policy, whole: bool) -> list[Tensor]:
        x, *w = (t.to(kind).detach().requires_grad_() for t in (fused, *weights))
        norms = HeadNorms(*w, 1e-5) if normed else None
        if whole:
            parts = qkv_heads(x * 1, *heads, norms, angles, policy=policy)
        else:
            parts = composed(x * 1, *heads, norms, angles, policy)
        gradients = torch.autograd.grad(parts, (x, *(w if normed else ())), [g.to(kind) for g in grads])
        return [*(p.detach() for p in parts), *gradients]

    ours, parts = run(dtype, TRITON, True), run(dtype, TRITON, False)
    for got, part in zip(ours[:3], parts[:3], strict=True):
        assert_same_bits(got, part)
    peer, exact = run(dtype, REFERENCE, False), run(torch.float64, REFERENCE, False)
    for a, b, c in zip(ours[3:], peer[3:], exact[3:], strict=True):
        assert_as_exact_as_torch(
            a, b, c, roundings=6 if dtype is torch.float32 else 2, magnitude=float(tokens)
        )


def test_without_a_gradient_the_bits_are_the_same() -> None:
    fused = random_tensor(0, 3, 8, 64)
    angles = _angles(3, 64, False, 1.0)
    for norms in (None, HeadNorms(random_tensor(1, 64), random_tensor(2, 64), 1e-5)):
        with torch.no_grad():
            alone = qkv_heads(fused.clone(), 4, 2, norms, angles, policy=TRITON)
        recorded = qkv_heads(fused.clone().requires_grad_() * 1, 4, 2, norms, angles, policy=TRITON)
        for a, b in zip(alone, recorded, strict=True):
            assert_same_bits(a, b.detach())


def test_weights_that_do_not_fit_are_refused() -> None:
    norms = HeadNorms(random_tensor(1, 32), random_tensor(2, 64), 1e-5)
    with pytest.raises(BackendError, match=r"weight must be \[64\]"):
        qkv_heads(random_tensor(0, 3, 8, 64), 4, 2, norms, _angles(3, 64, False, 1.0), policy=TRITON)
