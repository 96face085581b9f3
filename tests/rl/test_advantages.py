"""Advantages on packed tensors equal the sums of their definitions, sequence by sequence."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mainspring.errors import ConfigError
from mainspring.rl.math.advantages import decoupled_gae, gae, length_adaptive_lambda, whitened
from mainspring.rl.math.groups import group_advantages
from rl import oracles


@dataclass
class Packed:
    lengths: Tensor
    rewards: Tensor
    values: Tensor
    written: Tensor
    bootstrap: Tensor
    lams: Tensor


@st.composite
def packed(draw: st.DrawFn) -> Packed:
    lengths = draw(st.lists(st.integers(0, 7), min_size=1, max_size=5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def numbers(count: int) -> Tensor:
        return torch.randn(count, generator=generator, dtype=torch.float64)

    total = sum(lengths)
    return Packed(
        torch.tensor(lengths),
        numbers(total),
        numbers(total),
        torch.rand(total, generator=generator) < draw(st.sampled_from([0.3, 0.7, 1.1])),
        numbers(len(lengths)),
        torch.rand(len(lengths), generator=generator, dtype=torch.float64),
    )


def _naive(case: Packed, gamma: float, lams: list[float]) -> Tensor:
    result: list[float] = []
    pieces = [x.split(case.lengths.tolist()) for x in (case.rewards, case.values, case.written)]
    for s, (rewards, values, written) in enumerate(zip(*pieces, strict=True)):
        result += oracles.advantages(
            rewards.tolist(), values.tolist(), written.tolist(), gamma, lams[s], float(case.bootstrap[s])
        )
    return torch.tensor(result, dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(packed(), st.sampled_from([0.0, 0.9, 1.0]), st.sampled_from([0.0, 0.5, 1.0]))
def test_gae_is_the_sum_of_its_definition(case: Packed, gamma: float, lam: float) -> None:
    found = gae(
        case.rewards,
        case.values,
        case.lengths,
        gamma=gamma,
        lam=lam,
        written=case.written,
        bootstrap=case.bootstrap,
    )
    torch.testing.assert_close(found, _naive(case, gamma, [lam] * len(case.lengths)), rtol=1e-12, atol=1e-12)


def test_gae_of_three_tokens_around_a_tools_answer_by_hand() -> None:
    """γ = 0.5, λ = 0.5; the second token is a tool's, with a reward upon it that the first token earns."""
    rewards = torch.tensor([0.0, 1.0, 0.0, 2.0], dtype=torch.float64)
    values = torch.tensor([1.0, 99.0, 3.0, 4.0], dtype=torch.float64)
    written = torch.tensor([True, False, True, True])
    found = gae(rewards, values, torch.tensor([4]), gamma=0.5, lam=0.5, written=written)
    # δ: 1 + 0.5·3 − 1 = 1.5, 0 + 0.5·4 − 3 = −1, 2 + 0 − 4 = −2; A: 1.5 + 0.25·(−1.5), −1 + 0.25·(−2), −2.
    assert found.tolist() == [1.125, 0.0, -1.5, -2.0]
    _, targets = decoupled_gae(rewards, values, torch.tensor([4]), written=written)
    assert targets.tolist() == [3.0, 99.0, 2.0, 2.0]  # Monte-Carlo returns, and the tool's own value


def test_whitened_advantages_have_no_mean_and_unit_variance() -> None:
    assert whitened(torch.tensor([1.0, 2.0, 6.0])).tolist() == pytest.approx(
        [-2 / 7**0.5, -1 / 7**0.5, 3 / 7**0.5]
    )
    assert not whitened(torch.tensor([3.0])).any()
    assert not whitened(torch.full((5,), 3.0)).any()


@settings(max_examples=40, deadline=None)
@given(packed())
def test_each_sequence_may_have_its_own_lambda(case: Packed) -> None:
    found = gae(
        case.rewards,
        case.values,
        case.lengths,
        gamma=0.97,
        lam=case.lams,
        written=case.written,
        bootstrap=case.bootstrap,
    )
    torch.testing.assert_close(found, _naive(case, 0.97, case.lams.tolist()), rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(packed())
def test_tokens_of_tools_change_nothing_but_the_place_of_their_rewards(case: Packed) -> None:
    """What a tool answered may be cut out: the written tokens' advantages stay to the bit."""
    rewards = torch.where(case.written, case.rewards, 0)
    with_tools = gae(rewards, case.values, case.lengths, gamma=0.9, lam=0.8, written=case.written)
    kept = torch.tensor([int(w.sum()) for w in case.written.split(case.lengths.tolist())], dtype=torch.int64)
    alone = gae(rewards[case.written], case.values[case.written], kept, gamma=0.9, lam=0.8)
    assert torch.equal(with_tools[case.written], alone)
    assert not with_tools[~case.written].any()


@settings(max_examples=30, deadline=None)
@given(packed())
def test_decoupled_gae_gives_the_critic_monte_carlo_returns(case: Packed) -> None:
    advantages, targets = decoupled_gae(case.rewards, case.values, case.lengths, policy_lam=0.95)
    torch.testing.assert_close(advantages, gae(case.rewards, case.values, case.lengths, lam=0.95))
    returns = [
        float(piece[t:].sum())
        for piece in case.rewards.split(case.lengths.tolist())
        for t in range(len(piece))
    ]
    torch.testing.assert_close(targets, torch.tensor(returns, dtype=torch.float64))


def test_length_adaptive_lambda_grows_with_the_answer_and_is_clamped() -> None:
    lengths = torch.tensor([3, 20, 400, 0])
    written = torch.ones(423, dtype=torch.bool)
    found = length_adaptive_lambda(written, lengths, alpha=0.05, low=0.5)
    assert found.tolist() == pytest.approx([0.5, 0.5, 0.95, 0.5])
    written[:100] = False  # 23 of the two first sequences, 77 of the third
    assert float(length_adaptive_lambda(written, lengths, alpha=0.05)[2]) == pytest.approx(
        1 - 1 / (0.05 * 323)
    )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.floats(-5, 5), min_size=1, max_size=6), min_size=1, max_size=4),
    st.booleans(),
)
def test_group_advantages_compare_with_the_own_group_only(groups: list[list[float]], divide: bool) -> None:
    rewards = torch.tensor([r for g in groups for r in g], dtype=torch.float64)
    found = group_advantages(rewards, [len(g) for g in groups], divide_by_std=divide)
    expected = torch.tensor([a for g in groups for a in oracles.group(g, divide, 1e-6)], dtype=torch.float64)
    # Where a group's rewards are equal up to rounding, both sides divide rounding errors by eps.
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-8)


def test_equal_rewards_give_no_advantage() -> None:
    assert not group_advantages(torch.ones(7), [4, 2, 1]).any()


def test_what_does_not_fit_is_refused_with_the_numbers() -> None:
    four, lengths = torch.zeros(4), torch.tensor([2, 1])
    with pytest.raises(ConfigError, match="sum to 3, but there are 4 tokens"):
        gae(four, four, lengths)
    with pytest.raises(ConfigError, match=r"values has shape \(3,\)"):
        gae(four, four[:3], torch.tensor([4]))
    with pytest.raises(ConfigError, match=r"\[2, 1\].*4 rewards"):
        group_advantages(four, [2, 1])
    with pytest.raises(ConfigError, match="alpha must be above 0"):
        length_adaptive_lambda(four.bool(), torch.tensor([4]), alpha=0.0)
