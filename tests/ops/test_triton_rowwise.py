"""Triton's row-wise kernels: as exact as torch's, gradients too, and each row's bits its own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mainspring.errors import BackendError
from mainspring.ops import Policy, add_rms_norm, rms_norm, swiglu, token_log_probs
from mainspring.ops import norm as norm_operation
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
dtypes = st.sampled_from(DTYPES)
widths = st.sampled_from([1, 8, 24, 48, 100, 576, 1024, 3000])
counts = st.sampled_from([1, 2, 15, 33, 130])
# The interpreter takes a sum of two things at once element by element.
summed_widths = st.sampled_from([1, 8, 24, 100, 576]) if INTERPRETED else widths
summed_counts = st.sampled_from([1, 2, 15, 33]) if INTERPRETED else counts
seeds = st.integers(0, 99)


def norm_formula(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return norm_operation.reference(x, weight, eps, Policy("fast"))


@settings(max_examples=EXAMPLES if INTERPRETED else 2 * EXAMPLES, deadline=None)
@given(dtype=dtypes, m=summed_counts, h=summed_widths, seed=seeds)
def test_norms_and_their_gradients(dtype: torch.dtype, m: int, h: int, seed: int) -> None:
    x, residual, g, g_total = (random_tensor(seed + i, m, h, dtype=dtype) for i in range(4))
    weight = random_tensor(seed + 9, h, dtype=dtype)
    for fused in (False, True):
        tensors = (x, residual, weight) if fused else (x, weight)

        def outputs(
            inputs: tuple[Tensor, ...], ours: bool, fused: bool = fused, sum_dtype: torch.dtype = dtype
        ) -> tuple[Tensor, ...]:
            if ours:
                return (
                    add_rms_norm(*inputs, 1e-5, policy=TRITON)
                    if fused
                    else (rms_norm(*inputs, 1e-5, policy=TRITON),)
                )
            if not fused:
                return (norm_formula(*inputs, 1e-5),)
            # the sum is rounded to the dtype before it is normalised; that is part of the contract
            total = (inputs[0] + inputs[1]).to(sum_dtype).to(inputs[0].dtype)
            return norm_formula(total, inputs[2], 1e-5), total

        grads = (g, g_total) if fused else (g,)

        def with_gradients(
            inputs: tuple[Tensor, ...], ours: bool, grads: tuple[Tensor, ...] = grads
        ) -> list[Tensor]:
            leaves = tuple(t.detach().requires_grad_() for t in inputs)
            out = outputs(leaves, ours)
            found = torch.autograd.grad(out, leaves, [t.to(out[0].dtype) for t in grads])
            return [*(t.detach() for t in out), *found]

        ours, theirs = with_gradients(tensors, True), with_gradients(tensors, False)
        exact = with_gradients(tuple(t.double() for t in tensors), False)
        # x's gradient is g w / rms less its part along x: of a narrow row nearly nothing is left.
        total = x.double() + residual.double() * fused
        terms = (g * weight).double().abs().amax(1) * (total.square().mean(1) + 1e-5).rsqrt()
        for a, b, c in zip(ours, theirs, exact, strict=True):
            assert_as_exact_as_torch(
                a, b, c, roundings=4 + m**0.5 * (dtype is torch.float32), magnitude=terms.max().item()
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("h", [48, 100, 576, 1500])
def test_norms_of_a_row_do_not_depend_on_the_others(dtype: torch.dtype, h: int) -> None:
    x, residual = random_tensor(0, 40, h, dtype=dtype), random_tensor(1, 40, h, dtype=dtype)
    weight = random_tensor(2, h, dtype=dtype)
    whole = rms_norm(x, weight, 1e-5, policy=TRITON)
    normed, total = add_rms_norm(x, residual, weight, 1e-5, policy=TRITON)
    wide = torch.cat((x, x), 1)[:, :h]
    assert_same_bits(rms_norm(wide, weight, 1e-5, policy=TRITON), whole)
    for first, m in ((0, 1), (1, 1), (3, 2), (7, 33)):
        part = slice(first, first + m)
        assert_same_bits(rms_norm(x[part], weight, 1e-5, policy=TRITON), whole[part])
        a, b = add_rms_norm(x[part], residual[part], weight, 1e-5, policy=TRITON)
        assert_same_bits(a, normed[part])
        assert_same_bits(b, total[part])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_of_heads_in_a_fused_projection(dtype: torch.dtype) -> None:
    qkv = random_tensor(0, 5, 10, 16, dtype=dtype)
    weight = random_tensor(1, 16, dtype=dtype)
    for part in (qkv[:, :6], qkv[:, 6:8], qkv[2:3, 6:8]):
        got = rms_norm(part, weight, 1e-5, policy=TRITON)
        assert_same_bits(got, rms_norm(part.contiguous(), weight, 1e-5, policy=TRITON))
        exact = norm_formula(part.double(), weight.double(), 1e-5)
        assert_as_exact_as_torch(got, norm_formula(part, weight, 1e-5), exact, roundings=4)


@settings(max_examples=EXAMPLES, deadline=None)
@given(dtype=dtypes, m=counts, inner=widths, seed=seeds)
def test_swiglu_and_its_gradient(dtype: torch.dtype, m: int, inner: int, seed: int) -> None:
    x, grad = random_tensor(seed, m, 2 * inner, dtype=dtype), random_tensor(seed + 1, m, inner, dtype=dtype)

    def run(x: Tensor, ours: bool) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        gate, up = leaf.chunk(2, -1)
        out = swiglu(leaf, policy=TRITON) if ours else F.silu(gate) * up
        return [out.detach(), *torch.autograd.grad(out, leaf, grad.to(out.dtype))]

    for a, b, c in zip(run(x, True), run(x, False), run(x.double(), False), strict=True):
        assert_as_exact_as_torch(a, b, c, roundings=4)
    assert_same_bits(swiglu(x[-1:], policy=TRITON), swiglu(x, policy=TRITON)[-1:])


def test_swiglu_of_extreme_gates() -> None:
    x = torch.tensor([[-1e4, -90.0, 0.0, 90.0, 1.0, 2.0, 3.0, 4.0]], device=DEVICE)
    assert_as_exact_as_torch(
        swiglu(x, policy=TRITON),
        F.silu(x[:, :4]) * x[:, 4:],
        (F.silu(x[:, :4].double()) * x[:, 4:].double()),
    )


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    m=st.sampled_from([1, 3, 20]),
    v=st.sampled_from([1, 7, 97, 5000, 20001]),
    temperature=st.sampled_from([1.0, 0.7, 3.0]),
    scale=st.sampled_from([1.0, 100.0]),
    seed=seeds,
)
def test_log_probs(m: int, v: int, temperature: float, scale: float, seed: int) -> None:
    from mainspring.ops.triton.log_probs import logsumexp

    logits = random_tensor(seed, m, v, scale=scale)
    targets = torch.randint(0, v, (m,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    got = token_log_probs(logits, targets, temperature, policy=TRITON)
    exact = torch.log_softmax(logits.double() / temperature, -1).gather(1, targets[:, None])[:, 0]
    peer = torch.log_softmax(logits / temperature, -1).gather(1, targets[:, None])[:, 0]
    # the rounding of the tempered logit itself: half a unit in its last place
    slack = 2 + 2 * scale / max(float(exact.abs().max()), 1e-30) * 5 / temperature
    assert_as_exact_as_torch(got, peer, exact, roundings=slack)
    whole = logsumexp(logits, temperature)
    wide = torch.logsumexp(logits.double() / temperature, -1)
    assert_as_exact_as_torch(whole, torch.logsumexp(logits / temperature, -1), wide, roundings=slack + 2)
    for i in (0, m - 1):
        part = slice(i, i + 1)
        assert_same_bits(token_log_probs(logits[part], targets[part], temperature, policy=TRITON), got[part])
        assert_same_bits(logsumexp(logits[part], temperature), whole[part])


def test_a_target_outside_the_vocabulary_is_not_a_number() -> None:
    """What the public function finds on the CPU or in debug mode, the kernel itself answers without a wrong number."""
    from mainspring.ops.triton.log_probs import token_log_probs as kernel

    assert kernel(random_tensor(0, 2, 9), torch.tensor([-100, 9], device=DEVICE)).isnan().all()


def test_bad_input_is_refused() -> None:
    x = random_tensor(0, 3, 8)
    with pytest.raises(BackendError, match="weight"):
        rms_norm(x, torch.ones(7, device=DEVICE), 1e-5, policy=TRITON)
    with pytest.raises(BackendError, match="residual"):
        add_rms_norm(x, x[:2], torch.ones(8, device=DEVICE), 1e-5, policy=TRITON)
    with pytest.raises(BackendError, match="2 I"):
        swiglu(x[:, :7], policy=TRITON)
    with pytest.raises(BackendError, match="temperature"):
        token_log_probs(x, torch.zeros(3, dtype=torch.int64, device=DEVICE), 0.0, policy=TRITON)
    with pytest.raises(BackendError, match="float64"):
        swiglu(x.double(), policy=TRITON)
