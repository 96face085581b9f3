"""Policy, value, KL and preference losses: their values and gradients, token by token, and how they add up."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mainspring.errors import ConfigError
from mainspring.rl.math import kl
from mainspring.rl.math.aggregation import constant_normalised, mean_over_sequences, mean_over_tokens
from mainspring.rl.math.policy_loss import (
    clipped_policy_loss,
    sequence_log_ratio,
    truncated_importance_weights,
)
from mainspring.rl.math.preferences import (
    bradley_terry_loss,
    conservative_dpo_loss,
    dpo_loss,
    ipo_loss,
    robust_dpo_loss,
)
from mainspring.rl.math.value_loss import clipped_value_loss, explained_variance
from rl import oracles


def _numbers(count: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def _gradient(loss: Tensor, by: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss.sum(), by)
    return gradient


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([0.0, 0.2]),
    st.sampled_from([0.2, 0.28]),
    st.sampled_from([None, 3.0]),
)
def test_the_clipped_loss_and_its_gradient_follow_the_cases(
    seed: int, low: float, high: float, dual: float | None
) -> None:
    log_ratio = _numbers(60, seed).requires_grad_()
    advantages = _numbers(60, seed + 1)
    loss, clipped = clipped_policy_loss(log_ratio, advantages, clip_low=low, clip_high=high, dual_clip=dual)
    pairs = zip(log_ratio.tolist(), advantages.tolist(), strict=True)
    expected = torch.tensor([oracles.policy_loss(x, a, low, high, dual) for x, a in pairs])
    torch.testing.assert_close(loss, expected[:, 0].double(), rtol=1e-6, atol=1e-6)
    gradient = _gradient(loss, log_ratio)
    torch.testing.assert_close(gradient, expected[:, 1].double(), rtol=1e-6, atol=1e-6)
    assert torch.equal(clipped, gradient == 0)


def test_the_clips_by_hand() -> None:
    """Clip 0.2 and 0.28, dual clip 3: a rising ratio stops at 1.28, a falling one at 0.8, a bad one at three times."""
    cases = [(2.0, 1.0, -1.28), (0.5, 1.0, -0.5), (0.5, -1.0, 0.8), (2.0, -1.0, 2.0), (5.0, -1.0, 3.0)]
    ratio, advantage, expected = torch.tensor(cases, dtype=torch.float64).T
    loss, clipped = clipped_policy_loss(ratio.log(), advantage, clip_high=0.28, dual_clip=3.0)
    torch.testing.assert_close(loss, expected)
    assert clipped.tolist() == [True, False, True, False, True]
    squares, bounded = clipped_value_loss(
        torch.tensor([1.0, 0.1]), torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0]), clip=0.2
    )
    assert squares.tolist() == pytest.approx([0.5 * 0.8**2, 0.5 * 0.9**2])
    assert bounded.tolist() == [True, False]


def test_on_policy_the_loss_is_the_plain_policy_gradient() -> None:
    advantages = _numbers(20, 0)
    log_ratio = torch.zeros(20, dtype=torch.float64, requires_grad=True)
    loss, clipped = clipped_policy_loss(log_ratio, advantages)
    assert torch.equal(loss, -advantages)
    assert torch.equal(_gradient(loss, log_ratio), -advantages)
    assert not clipped.any()


def test_a_sequences_ratio_is_the_geometric_mean_of_its_written_tokens() -> None:
    lengths, written = torch.tensor([4, 2, 3]), torch.tensor([0, 1, 1, 0, 1, 1, 0, 0, 0], dtype=torch.bool)
    log_ratio = _numbers(9, 1).requires_grad_()
    found = sequence_log_ratio(log_ratio, written, lengths)
    x = log_ratio.tolist()
    first, second = (x[1] + x[2]) / 2, (x[4] + x[5]) / 2
    assert found.tolist() == pytest.approx([first] * 4 + [second] * 2 + [0.0] * 3)
    # A loss of one per sequence moves each written token by its share, the others not at all.
    gradient = _gradient(mean_over_sequences(found, written, lengths, num_sequences=3), log_ratio)
    assert gradient.tolist() == pytest.approx([0, 1 / 6, 1 / 6, 0, 1 / 6, 1 / 6, 0, 0, 0])


def test_importance_weights_are_ratios_up_to_the_cap_and_carry_no_gradient() -> None:
    log_ratio = torch.tensor([-1.0, 0.0, 0.5, 5.0], requires_grad=True)
    weights = truncated_importance_weights(log_ratio, cap=2.0)
    assert weights.tolist() == pytest.approx([math.exp(-1), 1.0, math.exp(0.5), 2.0])
    assert not weights.requires_grad


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.1, 0.5]))
def test_the_value_loss_is_the_worse_of_two_squares(seed: int, clip: float) -> None:
    values, old, returns = (_numbers(40, seed + i) for i in range(3))
    loss, clipped = clipped_value_loss(values.requires_grad_(), old, returns, clip=clip)
    triples = zip(values.tolist(), old.tolist(), returns.tolist(), strict=True)
    expected = [oracles.value_loss(v, o, r, clip) for v, o, r in triples]
    assert loss.tolist() == pytest.approx(expected)
    assert torch.equal(_gradient(loss, values) == 0, clipped)
    unclipped, none = clipped_value_loss(values, old, returns, clip=None)
    torch.testing.assert_close(unclipped, 0.5 * (values - returns) ** 2)
    assert not none.any()


def test_explained_variance_knows_the_perfect_the_constant_and_the_shifted_critic() -> None:
    returns = _numbers(50, 3)
    assert float(explained_variance(returns, returns)) == 1.0
    assert float(explained_variance(returns + 7, returns)) == pytest.approx(1.0)
    assert float(explained_variance(torch.full_like(returns, 0.3), returns)) == pytest.approx(0.0)
    assert float(explained_variance(-returns, returns)) == pytest.approx(-3.0)
    assert math.isnan(float(explained_variance(returns, torch.ones_like(returns))))


def test_kl_estimators_have_the_expectations_they_promise() -> None:
    """Over a whole vocabulary expectations are sums, so no sampling blurs the comparison."""
    logits = _numbers(7, 4).requires_grad_()
    log_p, log_q = torch.log_softmax(logits, 0), torch.log_softmax(_numbers(7, 5), 0)
    p = log_p.exp()
    truth = (p * (log_p - log_q)).sum()
    for estimator in (kl.k1, kl.k3, kl.k3_with_k2_gradient):
        torch.testing.assert_close((p * estimator(log_p, log_q)).sum(), truth)
    (slope,) = torch.autograd.grad(truth, logits, retain_graph=True)

    def expected_gradient(estimator: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        fresh = torch.log_softmax(logits, 0)
        return _gradient(p.detach() * estimator(fresh, log_q), logits)

    torch.testing.assert_close(expected_gradient(kl.k2), slope)
    torch.testing.assert_close(expected_gradient(kl.k3_with_k2_gradient), slope)
    torch.testing.assert_close(expected_gradient(kl.k1), torch.zeros_like(slope))
    assert (expected_gradient(kl.k3) - slope).abs().max() > 1e-2  # which is why the mixed one exists


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=9), st.lists(st.floats(-3, 3), min_size=9, max_size=9))
def test_k2_and_k3_are_never_negative(log_probs: list[float], reference: list[float]) -> None:
    a = torch.tensor(log_probs, dtype=torch.float64)
    b = torch.tensor(reference[: len(log_probs)], dtype=torch.float64)
    assert bool((kl.k2(a, b) >= 0).all())
    assert bool((kl.k3(a, b) >= -1e-15).all())
    assert torch.equal(kl.k3(a, a), torch.zeros_like(a))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=6), st.integers(0, 10**6), st.integers(1, 5))
def test_losses_add_up_however_the_step_is_cut(lengths: list[int], seed: int, cut: int) -> None:
    cut = min(cut, len(lengths) - 1)
    losses, written = _numbers(sum(lengths), seed), _numbers(sum(lengths), seed + 1) > -0.5
    num_tokens, count = int(written.sum()) or 1, len(lengths)

    def of(first: int, last: int) -> list[float]:
        span = slice(sum(lengths[:first]), sum(lengths[:last]))
        x, w, n = losses[span], written[span], torch.tensor(lengths[first:last])
        return [
            float(mean_over_tokens(x, w, num_tokens=num_tokens)),
            float(mean_over_sequences(x, w, n, num_sequences=count)),
            float(constant_normalised(x, w, num_sequences=count, max_tokens=6)),
        ]

    parts = [a + b for a, b in zip(of(0, cut), of(cut, count), strict=True)]
    assert parts == pytest.approx(of(0, count), abs=1e-12)
    pieces = list(zip(losses.split(lengths), written.split(lengths), strict=True))
    means = [sum(x[w].tolist()) / max(int(w.sum()), 1) for x, w in pieces]
    total = sum(losses[written].tolist())
    naive = [total / num_tokens, sum(means) / count, total / (count * 6)]
    assert of(0, count) == pytest.approx(naive, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.floats(-20, 20), st.sampled_from([0.05, 0.5]), st.sampled_from([0.0, 0.1, 0.4]))
def test_preference_losses_are_their_formulas(h: float, beta: float, flipped: float) -> None:
    margin = torch.tensor([h], dtype=torch.float64)
    win, lose = -math.log(oracles.sigmoid(beta * h)), -math.log(oracles.sigmoid(-beta * h))
    assert float(dpo_loss(margin, beta=beta)) == pytest.approx(win)
    conservative = float(conservative_dpo_loss(margin, beta=beta, flipped=flipped))
    assert conservative == pytest.approx((1 - flipped) * win + flipped * lose)
    robust = float(robust_dpo_loss(margin, beta=beta, flipped=flipped))
    assert robust == pytest.approx(((1 - flipped) * win - flipped * lose) / (1 - 2 * flipped))
    assert float(ipo_loss(margin, tau=beta)) == pytest.approx((h - 1 / (2 * beta)) ** 2)
    scores = torch.tensor([h + 1], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)
    bradley_terry = float(bradley_terry_loss(*scores, margin=0.5))
    assert bradley_terry == pytest.approx(-math.log(oracles.sigmoid(h - 0.5)))


def test_robust_dpo_is_unbiased_under_flipped_labels_and_conservative_dpo_has_its_goal() -> None:
    h = _numbers(30, 8, 4.0)
    expected = 0.8 * robust_dpo_loss(h, flipped=0.2) + 0.2 * robust_dpo_loss(-h, flipped=0.2)
    torch.testing.assert_close(expected, dpo_loss(h))
    goal = torch.tensor([math.log(0.8 / 0.2) / 0.1], dtype=torch.float64, requires_grad=True)
    assert float(_gradient(conservative_dpo_loss(goal, flipped=0.2), goal)) == pytest.approx(0, abs=1e-12)


def test_settings_out_of_range_are_refused() -> None:
    one, yes = torch.zeros(1), torch.ones(1, dtype=torch.bool)
    for call, message in (
        (lambda: clipped_policy_loss(one, one, clip_low=1.5), "clip_low must be within"),
        (lambda: clipped_policy_loss(one, one, dual_clip=1.1), "dual_clip must be above"),
        (lambda: clipped_value_loss(one, one, one, clip=0.0), "clip must be above 0"),
        (lambda: truncated_importance_weights(one, 0.0), "cap must be above 0"),
        (lambda: mean_over_tokens(one, yes, num_tokens=0), "num_tokens must be at least 1"),
        (lambda: dpo_loss(one, beta=0.0), "beta must be above 0"),
        (lambda: robust_dpo_loss(one, flipped=0.5), "flipped labels must be within"),
        (lambda: ipo_loss(one, tau=-1.0), "tau must be above 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
