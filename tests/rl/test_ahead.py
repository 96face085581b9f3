"""Rollouts one step ahead: a lag of one, the same whoever is faster, resumed to the bit, and checked all the same."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest
import torch

from mainspring.errors import LockstepError
from mainspring.model.decoder import Decoder
from mainspring.rl.ahead import RolloutsAhead
from mainspring.rl.critic import Critic
from mainspring.rl.grpo import GrpoSettings, grpo
from mainspring.rl.ppo_metrics import PpoMetrics
from mainspring.rl.rollout_settings import RolloutSettings
from mainspring.rl.value_model import ValueModel
from mainspring.rl.vapo import VapoSettings, vapo
from mainspring.train.optimizer import Optimizer
from mainspring.train.recipe import OptimizerSection, ScheduleSection
from rl import oracles, sorting

STEADY = ScheduleSection(kind="constant", warmup_fraction=0.0)
MOVING = OptimizerSection(lr=3e-3, weight_decay=0.0)
SETTINGS = GrpoSettings(max_steps=5, schedule=STEADY, importance_cap=2.0)
ROLLOUTS = RolloutSettings(prompts_per_step=3, group_size=4, max_tokens=8, seed=2)


def ahead(model: Decoder, settings: RolloutSettings = ROLLOUTS) -> RolloutsAhead:
    return RolloutsAhead(model, sorting.prompts(40, 3), sorting.TEXTS, sorting.Graded(), settings)


def test_answers_are_one_version_old_after_the_first_step_and_checked_against_it() -> None:
    model = sorting.model("lockstep")
    with ahead(model) as rollouts:
        metrics = list(grpo(model, Optimizer(model, MOVING), rollouts, SETTINGS))
    assert [m.lag for m in metrics] == [0.0, 1.0, 1.0, 1.0, 1.0]
    assert all(m.max_delta == 0 and m.compared > 0 for m in metrics)
    assert all(m.kl_old > 0 for m in metrics[2:]), "the weights have moved since"


@pytest.mark.parametrize("slice_tokens", [None, 3])
def test_a_run_ahead_goes_on_from_its_state_to_the_bit(slice_tokens: int | None) -> None:
    settings = replace(ROLLOUTS, slice_tokens=slice_tokens)
    whole = sorting.model("lockstep")
    with ahead(whole, settings) as rollouts:
        through = list(grpo(whole, Optimizer(whole, MOVING), rollouts, SETTINGS))
    model = sorting.model("lockstep")
    optimizer = Optimizer(model, MOVING)
    with ahead(model, settings) as rollouts:
        list(islice(grpo(model, optimizer, rollouts, SETTINGS), 2))
        state = rollouts.state
    resumed = sorting.model("lockstep", seed=9)
    resumed.load_state_dict(model.state_dict())
    again = Optimizer(resumed, MOVING)
    again.load_state_tensors(optimizer.state_tensors())
    with ahead(resumed, settings) as rollouts:
        rollouts.restore(state)
        rest = list(grpo(resumed, again, rollouts, SETTINGS, first_step=2))
    assert [(m.reward, m.lag) for m in rest] == [(m.reward, m.lag) for m in through[2:]]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_an_engine_that_is_not_its_own_copy_stops_the_run() -> None:
    model = sorting.model("lockstep")
    with ahead(model) as rollouts:
        steps = grpo(model, Optimizer(model, MOVING), rollouts, SETTINGS)
        next(steps)
        rollouts._settle()
        groups, report = rollouts._written or ([], None)
        assert report is not None
        wrong = [[replace(t, log_probs=(t.log_probs[0] - 1e-3, *t.log_probs[1:])) for t in g] for g in groups]
        rollouts._written = wrong, report
        with pytest.raises(LockstepError, match=r"max \|delta\| = 0\.00"):
            next(steps)


def test_held_out_prompts_are_answered_by_the_newest_weights() -> None:
    model = sorting.model("lockstep")
    held_out = sorting.prompts(4, 9)
    with ahead(model) as rollouts:
        steps = grpo(model, Optimizer(model, MOVING), rollouts, SETTINGS)
        next(steps)
        answers = [t for g in rollouts.answer(held_out) for t in g]
        for answer in answers:
            log_p = model.log_probs([answer.tokens])[0][-answer.num_written :]
            assert log_p.tolist() == list(answer.log_probs)


def test_a_step_on_old_answers_weighs_tokens_by_capped_importance() -> None:
    """The gradient's norm, by autograd on the definition: min(π/π_old, c) · A · ∇ log π."""
    settings = replace(SETTINGS, importance_cap=1.01, clip_norm=0.0)
    model = sorting.model("lockstep")
    with ahead(model) as rollouts:
        steps = grpo(model, Optimizer(model, MOVING), rollouts, settings)
        assert next(islice(steps, 1, 2)).grad_norm > 0
        fresh = sorting.model("lockstep")
        fresh.load_state_dict(model.state_dict())
        metrics = next(steps)
    loss = torch.zeros(())
    answers = [t for g in metrics.groups for t in g]
    advantages = [a for g in metrics.groups for a in oracles.group([t.reward for t in g], True, 1e-6)]
    capped = 0
    for answer, advantage in zip(answers, advantages, strict=True):
        log_p = fresh.log_probs([answer.tokens])[0][-answer.num_written :]
        weights = (log_p.detach() - torch.tensor(answer.log_probs)).exp()
        capped += int((weights > 1.01).sum())
        loss = loss - advantage * (weights.clamp(max=1.01) * log_p).mean() / len(answers)
    assert capped, "some tokens have become likelier by more than the cap"
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in fresh.parameters() if p.grad is not None])
    assert metrics.grad_norm == pytest.approx(float(norm), rel=1e-4)


def test_what_has_a_critic_weighs_old_answers_too_and_fresh_ones_by_one() -> None:
    def run(cap: float | None) -> tuple[Decoder, list[PpoMetrics]]:
        model = sorting.model("lockstep")
        values = ValueModel.of(model)
        critic = Critic(values, Optimizer(values, MOVING))
        settings = VapoSettings(
            max_steps=4, warmup_steps=1, mini_batches=2, schedule=STEADY, importance_cap=cap
        )
        with ahead(model) as rollouts:
            return model, list(vapo(model, Optimizer(model, MOVING), critic, rollouts, settings))

    plain, capped, tight = run(None), run(2.0), run(1.001)
    for _, metrics in (plain, capped, tight):
        assert [m.lag for m in metrics] == [0.0, 1.0, 1.0, 1.0]
        assert all(m.max_delta == 0 and m.compared > 0 for m in metrics)
    norms = [[m.grad_norm for m in metrics[1:]] for _, metrics in (plain, capped, tight)]
    # The policy stayed in the first step, so what the second learns from is its own: all weights are 1.
    assert norms[0][0] == norms[1][0] == norms[2][0]
    assert norms[1][1] != norms[2][1], "some tokens have become likelier by more than the cap"
