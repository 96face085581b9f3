"""Linear + cross-entropy and log-probabilities in PyTorch: options, reductions, entropy, and gradients in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mainspring import ops
from mainspring.errors import BackendError
from mainspring.ops import Policy
from mainspring.ops.cross_entropy import Reduction, reference
from mainspring.ops.logit_loss import LossOptions

REFERENCES = [Policy("lockstep", "reference"), Policy("fast", "reference")]
both_numerics = pytest.mark.parametrize("policy", REFERENCES, ids=lambda p: p.numerics)
TARGETS = torch.tensor([0, 3, -100, 10, 5, 5, -100, 2, 1])
OPTIONS = [
    LossOptions(),
    LossOptions(label_smoothing=0.1),
    LossOptions(z_loss=0.01),
    LossOptions(softcap=1.5),
    LossOptions(softcap=2.0, label_smoothing=0.2, z_loss=0.03),
]


def _random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def _loss(
    hidden: Tensor, weight: Tensor, options: LossOptions, reduction: Reduction, policy: Policy
) -> Tensor:
    return ops.cross_entropy(
        hidden,
        weight,
        TARGETS,
        reduction=reduction,
        label_smoothing=options.label_smoothing,
        z_loss=options.z_loss,
        softcap=options.softcap,
        policy=policy,
    )


@both_numerics
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_cross_entropy_and_its_gradient(options: LossOptions, reduction: Reduction, policy: Policy) -> None:
    hidden, weight = _random(9, 6), _random(11, 6, seed=1)
    rows = reference(hidden, weight, TARGETS, options)
    expected = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / 7}[reduction]
    got = _loss(hidden, weight, options, reduction, policy)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    scale = _random(*got.shape, seed=2).detach()
    for a, b in zip(
        torch.autograd.grad(got, (hidden, weight), scale),
        torch.autograd.grad(expected, (hidden, weight), scale),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
    assert torch.autograd.gradcheck(lambda h, w: _loss(h, w, options, reduction, policy), (hidden, weight))


@both_numerics
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_with_entropy_and_their_gradients(temperature: float, policy: Policy) -> None:
    hidden, weight, targets = _random(9, 6), _random(11, 6, seed=1), TARGETS.clamp_min(0)

    def both(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return ops.linear_log_probs_and_entropy(h, w, targets, temperature, policy=policy)

    log_probs, entropy = both(hidden, weight)
    log_p = torch.log_softmax(hidden @ weight.t() / temperature, -1)
    torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(-1))
    plain = ops.linear_log_probs(hidden, weight, targets, temperature, policy=policy)
    assert torch.equal(log_probs, plain)
    assert torch.autograd.gradcheck(both, (hidden, weight))
    assert torch.autograd.gradcheck(lambda h, w: both(h, w)[1], (hidden, weight))
    assert torch.autograd.gradcheck(lambda h, w: both(h, w)[0], (hidden, weight))


def test_entropy_of_a_certain_word_is_zero() -> None:
    logits = torch.tensor([[0.0, -torch.inf, -torch.inf], [1.0, 1.0, -torch.inf]])
    _, entropy = ops.token_log_probs_and_entropy(logits, torch.zeros(2, dtype=torch.int64))
    torch.testing.assert_close(
        entropy, torch.tensor([0.0, 2.0]).log1p().mul(torch.tensor([0.0, 1.0])) * 0.6309297
    )


def test_the_loss_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = _random(50, 6).detach().float(), _random(11, 6, seed=1).detach().float()
    targets = torch.arange(50) % 11
    whole = ops.cross_entropy(hidden, weight, targets)
    monkeypatch.setattr("mainspring.ops.logit_loss.LOGIT_CHUNK_ELEMENTS", 1)
    assert torch.equal(ops.cross_entropy(hidden, weight, targets), whole)


def test_gradients_in_bfloat16_are_scaled_in_float32() -> None:
    hidden = _random(40, 16).detach().bfloat16().requires_grad_()
    weight = _random(50, 16, seed=1).detach().bfloat16().requires_grad_()
    targets = torch.arange(40) % 49
    means = torch.autograd.grad(ops.cross_entropy(hidden, weight, targets), (hidden, weight))
    sums = torch.autograd.grad(ops.cross_entropy(hidden, weight, targets, reduction="sum"), (hidden, weight))
    for mean, total in zip(means, sums, strict=True):
        assert torch.equal(mean, (total.float() / 40).bfloat16())


def test_bad_input_is_refused() -> None:
    hidden, weight = _random(9, 6), _random(11, 6)
    with pytest.raises(BackendError, match="reduction"):
        ops.cross_entropy(hidden, weight, TARGETS, reduction="median")
    with pytest.raises(BackendError, match="label_smoothing must be in"):
        ops.cross_entropy(hidden, weight, TARGETS, label_smoothing=1.0)
    with pytest.raises(BackendError, match="softcap"):
        ops.cross_entropy(hidden, weight, TARGETS, softcap=0.0)
    with pytest.raises(BackendError, match="z_loss"):
        ops.cross_entropy(hidden, weight, TARGETS, z_loss=-1.0)
    with pytest.raises(BackendError, match=r"weight .* does not fit"):
        ops.cross_entropy(hidden, weight[:, :5], TARGETS)
    with pytest.raises(BackendError, match="targets must be"):
        ops.cross_entropy(hidden, weight, TARGETS[:3])
