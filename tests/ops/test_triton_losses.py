"""Triton's loss kernels: as exact as torch's, gradients too, and each row's bits its own."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mainspring.errors import BackendError
from mainspring.ops import (
    Policy,
    cross_entropy,
    linear,
    linear_log_probs,
    linear_log_probs_and_entropy,
    token_log_probs,
    token_log_probs_and_entropy,
)
from mainspring.ops.cross_entropy import reference
from mainspring.ops.logit_loss import LossOptions, logit_loss
from mainspring.ops.logit_loss import reference as logit_loss_reference
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
seeds = st.integers(0, 99)
vocabularies = st.sampled_from([1, 7, 97, 5000, 20001, 24576])


def random_targets(seed: int, m: int, v: int) -> Tensor:
    return torch.randint(0, v, (m,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@settings(max_examples=2 * EXAMPLES, deadline=None)
@given(
    m=st.sampled_from([1, 3, 9]),
    v=vocabularies,
    temperature=st.sampled_from([1.0, 0.7]),
    softcap=st.sampled_from([None, 30.0]),
    label_smoothing=st.sampled_from([0.0, 0.1]),
    z_loss=st.sampled_from([0.0, 1e-3]),
    scale=st.sampled_from([1.0, 50.0]),
    dtype=st.sampled_from([None, *DTYPES]),
    weighted=st.booleans(),
    entropy=st.booleans(),
    seed=seeds,
)
def test_loss_of_logits_and_its_gradient_in_place(
    m: int,
    v: int,
    temperature: float,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    scale: float,
    dtype: torch.dtype | None,
    weighted: bool,
    entropy: bool,
    seed: int,
) -> None:
    options = LossOptions(temperature, softcap, label_smoothing, z_loss)
    logits, targets = random_tensor(seed, m, v, scale=scale), random_targets(seed, m, v)
    targets[::4] = -100
    weights = random_tensor(seed + 1, m) if weighted else None
    entropy_weights = random_tensor(seed + 2, m) if entropy else None

    def formula(z: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
        wide = [None if w is None else w.to(z.dtype) for w in (weights, entropy_weights)]
        return logit_loss_reference(z, targets, options, *wide, dtype)

    exact, exact_gradient = formula(logits.double(), None if dtype is None else torch.float64)
    peer, peer_gradient = formula(logits.clone(), dtype)
    address = logits.data_ptr()
    got, gradient = logit_loss(logits, targets, options, weights, entropy_weights, dtype, TRITON)
    magnitude = float(exact.abs().max()) + 4 * scale / temperature * (1 + z_loss * 40)
    assert_as_exact_as_torch(got, peer, exact, roundings=8, magnitude=2 * magnitude)
    assert (gradient is None) == (dtype is None)
    if gradient is None or peer_gradient is None or exact_gradient is None:
        return
    assert address <= gradient.data_ptr() < address + 4 * m * v
    largest = float(exact_gradient.abs().max())
    # p = e^x of an x near 100 carries 100 roundings of float32
    assert_as_exact_as_torch(
        gradient,
        peer_gradient,
        exact_gradient,
        roundings=4,
        magnitude=largest * (8 + 8 * scale / temperature),
    )


def test_a_row_has_its_own_bits() -> None:
    logits, targets = random_tensor(0, 40, 40001), random_targets(0, 40, 40001)
    options = LossOptions(label_smoothing=0.1, z_loss=1e-4)
    losses, gradient = logit_loss(logits.clone(), targets, options, None, None, torch.float16, TRITON)
    assert gradient is not None
    for first, m in ((0, 1), (1, 1), (3, 2), (7, 33)):
        part = slice(first, first + m)
        some, some_gradient = logit_loss(
            logits[part].clone(), targets[part], options, None, None, torch.float16, TRITON
        )
        assert some_gradient is not None
        assert_same_bits(some, losses[part])
        assert_same_bits(some_gradient, gradient[part])
        forward_only, _ = logit_loss(logits[part].clone(), targets[part], options, None, None, None, TRITON)
        assert_same_bits(forward_only, losses[part])


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    m=st.sampled_from([1, 3, 9]),
    v=vocabularies,
    temperature=st.sampled_from([1.0, 0.7, 3.0]),
    scale=st.sampled_from([1.0, 100.0]),
    seed=seeds,
)
def test_log_probs_with_entropy(m: int, v: int, temperature: float, scale: float, seed: int) -> None:
    logits, targets = random_tensor(seed, m, v, scale=scale), random_targets(seed, m, v)
    log_probs, entropy = token_log_probs_and_entropy(logits, targets, temperature, policy=TRITON)
    assert_same_bits(log_probs, token_log_probs(logits, targets, temperature, policy=TRITON))
    exact = torch.log_softmax(logits.double() / temperature, -1)
    peer = torch.log_softmax(logits / temperature, -1)
    of = [-(log_p.exp() * log_p).sum(-1) for log_p in (peer, exact)]
    assert_as_exact_as_torch(entropy, *of, roundings=4, magnitude=2 + float(of[1].max()))
    for i in (0, m - 1):
        part = slice(i, i + 1)
        one = token_log_probs_and_entropy(logits[part], targets[part], temperature, policy=TRITON)
        assert_same_bits(one[0], log_probs[part])
        assert_same_bits(one[1], entropy[part])


@pytest.mark.parametrize("programs", [1, 3, 1000])
def test_who_reads_which_segment_changes_no_bit(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from mainspring.ops.triton import log_probs as triton

    logits, targets = random_tensor(0, 7, 70001), random_targets(0, 7, 70001)
    expected = token_log_probs(logits, targets, policy=TRITON)
    monkeypatch.setattr(triton, "PROGRAMS_EACH", programs)
    assert_same_bits(token_log_probs(logits, targets, policy=TRITON), expected)


def assert_gradients(ours: list[Tensor], theirs: list[Tensor], exact: list[Tensor], slack: float) -> None:
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert_as_exact_as_torch(a, b, c, roundings=slack)


def set_rows_per_chunk(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    for name in ("cross_entropy", "log_probs", "logit_loss"):
        module = importlib.import_module(f"mainspring.ops.{name}")  # a function hides the module of its name
        monkeypatch.setattr(module, "rows_per_chunk", lambda v, device=None: rows)


@pytest.mark.parametrize("numerics", ["lockstep", "fast"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk", [16, 64])
def test_linear_cross_entropy(
    chunk: int, reduction: str, dtype: torch.dtype, numerics: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_rows_per_chunk(monkeypatch, chunk)
    m, h, v = 50, 32, 201
    hidden, weight = random_tensor(0, m, h, dtype=dtype), random_tensor(1, v, h, dtype=dtype, scale=0.3)
    targets = random_targets(2, m, v)
    targets[5:25:3] = -100
    scale = random_tensor(3, m).abs() if reduction == "none" else torch.tensor(0.7, device=DEVICE)
    options = LossOptions(z_loss=1e-3, softcap=20.0)
    policy = Policy("fast", "triton" if INTERPRETED else None) if numerics == "fast" else TRITON

    def run(ours: bool, dtype: torch.dtype) -> list[Tensor]:
        a, b = hidden.detach().to(dtype).requires_grad_(), weight.detach().to(dtype).requires_grad_()
        if ours:
            loss = cross_entropy(a, b, targets, reduction=reduction, z_loss=1e-3, softcap=20.0, policy=policy)
        else:
            loss = reference(a, b, targets, options)
            if reduction != "none":
                loss = loss.sum() / (43 if reduction == "mean" else 1)
        assert not ours or loss.dtype is torch.float32
        return [loss.detach(), *torch.autograd.grad(loss, (a, b), scale.to(loss.dtype))]

    exact = run(False, torch.float64)
    peer = run(False, dtype)
    ours = run(True, dtype)
    slack = 4 if dtype is not torch.float32 else 40
    assert_gradients(ours, peer, exact, slack)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_log_probs_and_entropy(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    set_rows_per_chunk(monkeypatch, 32)
    m, h, v, temperature = 50, 32, 201, 0.8
    hidden, weight = random_tensor(0, m, h, dtype=dtype), random_tensor(1, v, h, dtype=dtype, scale=0.3)
    targets = random_targets(2, m, v)
    scales = random_tensor(3, m), random_tensor(4, m)

    def run(ours: bool, dtype: torch.dtype) -> list[Tensor]:
        a, b = hidden.detach().to(dtype).requires_grad_(), weight.detach().to(dtype).requires_grad_()
        if ours:
            out = linear_log_probs_and_entropy(a, b, targets, temperature, policy=TRITON)
        else:
            log_p = torch.log_softmax(a @ b.t() / temperature, -1)
            out = log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
        grads = torch.autograd.grad(out, (a, b), [s.to(out[0].dtype) for s in scales])
        return [*(t.detach() for t in out), *grads]

    ours = run(True, dtype)
    assert_gradients(
        ours, run(False, dtype), run(False, torch.float64), 4 if dtype is not torch.float32 else 40
    )
    assert_same_bits(ours[0], linear_log_probs(hidden, weight, targets, temperature, policy=TRITON))
    logits = linear(hidden, weight, out_dtype=torch.float32, policy=TRITON)
    assert_same_bits(ours[0], token_log_probs(logits, targets, temperature, policy=TRITON))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no shared memory to run out of")
@pytest.mark.parametrize(
    "v", [5003, 8192]
)  # rows that a tensor descriptor cannot store, and rows that it can
def test_every_tile_has_room_for_float32_logits(v: int) -> None:
    from mainspring.ops.triton.linear import _CHOICES
    from mainspring.ops.triton.linear import linear as triton_linear

    hidden = random_tensor(0, 300, 256, dtype=torch.bfloat16)
    weight = random_tensor(1, v, 256, dtype=torch.bfloat16)
    first, *others = (
        triton_linear(hidden, weight, out_dtype=torch.float32, tile=choice.tile) for choice in _CHOICES
    )
    assert_as_exact_as_torch(
        first, hidden.float() @ weight.float().t(), hidden.double() @ weight.double().t(), roundings=64
    )
    for other in others:
        assert_same_bits(other, first)


def test_targets_outside_the_vocabulary() -> None:
    logits, options = random_tensor(0, 3, 9), LossOptions()
    targets = torch.tensor([-100, 9, -1], device=DEVICE)
    losses, _ = logit_loss(logits, targets, options, None, None, None, TRITON)
    assert losses[0] == 0
    assert losses[1:].isnan().all()


def test_bad_input_is_refused() -> None:
    from mainspring.ops.triton.cross_entropy import cross_entropy as triton_cross_entropy

    logits, targets = random_tensor(0, 3, 8), torch.zeros(3, dtype=torch.int64, device=DEVICE)
    with pytest.raises(BackendError, match="contiguous"):
        triton_cross_entropy(logits[:, :7], targets)
    with pytest.raises(BackendError, match="targets"):
        triton_cross_entropy(logits, targets.int())
    with pytest.raises(BackendError, match="temperature"):
        triton_cross_entropy(logits, targets, temperature=0.0)
    with pytest.raises(BackendError, match="does not fit into"):
        triton_cross_entropy(logits.half(), targets, gradient_dtype=torch.float32)
    with pytest.raises(BackendError, match="weights"):
        triton_cross_entropy(logits, targets, weights=torch.ones(2, device=DEVICE))
