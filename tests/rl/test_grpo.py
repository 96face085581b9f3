"""GRPO and its relatives: the loss by hand, however it is cut, resumed to the bit, in lockstep; groups that teach."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch

from mainspring.errors import ConfigError, LockstepError, MainspringError
from mainspring.model.decoder import Decoder
from mainspring.rl.grpo import DAPO, DR_GRPO, GSPO, GrpoSettings, grpo
from mainspring.rl.grpo_metrics import GrpoMetrics
from mainspring.rl.math.length_penalty import overlong_penalty
from mainspring.rl.rewards import Completion, Scorer
from mainspring.rl.rollout_settings import RolloutSettings
from mainspring.rl.rollouts import Rollouts
from mainspring.train.optimizer import Optimizer
from mainspring.train.recipe import OptimizerSection, ScheduleSection
from rl import oracles, sorting

STEADY = ScheduleSection(kind="constant", warmup_fraction=0.0)
# A large eps makes AdamW's step a smooth function of the gradient, so that equal weights mean equal gradients.
SMOOTH = OptimizerSection(lr=0.1, eps=1.0, weight_decay=0.0)
ROLLOUTS = RolloutSettings(prompts_per_step=3, group_size=4, max_tokens=8, seed=2)
SETTINGS = GrpoSettings(max_steps=2, schedule=STEADY)


def source(
    model: Decoder, settings: RolloutSettings = ROLLOUTS, scorer: Scorer | None = None, **more: bool
) -> Rollouts:
    scorer = sorting.Graded() if scorer is None else scorer
    return Rollouts(model, sorting.prompts(40, 3), sorting.TEXTS, scorer, settings, **more)


def run(
    settings: GrpoSettings, model: Decoder | None = None, **more: Any
) -> tuple[Decoder, list[GrpoMetrics]]:
    model = sorting.model("lockstep") if model is None else model
    return model, list(grpo(model, Optimizer(model, SMOOTH), source(model), settings, **more))


def test_the_first_step_is_the_plain_policy_gradient_and_its_ratio_is_one() -> None:
    model, [metrics] = run(replace(SETTINGS, max_steps=1))
    assert (metrics.max_delta, metrics.kl_old, metrics.clip_fraction, metrics.lag) == (0.0, 0.0, 0.0, 0.0)
    assert metrics.compared == metrics.tokens == sum(t.num_written for g in metrics.groups for t in g)
    expected = [
        a for g in metrics.groups for a in oracles.group([t.reward for t in g], divide_by_std=True, eps=1e-6)
    ]
    assert metrics.advantages == pytest.approx(expected, rel=1e-4, abs=1e-5)
    # With ratios of 1 the loss is minus the advantages' mean: of groups whose advantages sum to 0.
    assert metrics.loss == pytest.approx(0.0, abs=1e-6)
    # The gradient, by autograd on the definition.
    fresh = sorting.model("lockstep")
    answers = [t for g in metrics.groups for t in g]
    loss = torch.zeros(())
    for answer, advantage in zip(answers, metrics.advantages, strict=True):
        log_p = fresh.log_probs([answer.tokens])[0][-answer.num_written :]
        loss = loss - advantage * (log_p - log_p.detach()).exp().mean() / len(answers)
    loss.backward()
    optimizer = Optimizer(fresh, SMOOTH)
    optimizer.accumulate()
    assert optimizer.step(1.0, 1.0) == pytest.approx(metrics.grad_norm, rel=1e-4)
    for mine, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


VARIANTS = {
    "grpo": SETTINGS,
    "mini_batches": replace(SETTINGS, mini_batches=3, epochs=2),
    "dr_grpo": replace(DR_GRPO, max_steps=2, schedule=STEADY),
    "dapo": replace(DAPO, max_steps=2, schedule=STEADY, overlong_buffer=4),
    "gspo": replace(GSPO, max_steps=2, schedule=STEADY, mini_batches=2),
    "kl": replace(SETTINGS, kl_loss=0.1, entropy_bonus=0.01),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_result_does_not_depend_on_tokens_per_microbatch(name: str) -> None:
    reference = sorting.model("lockstep", seed=4) if name == "kl" else None
    cut, whole = (
        run(replace(VARIANTS[name], tokens_per_microbatch=tokens), reference=reference)
        for tokens in (25, 100_000)
    )
    for mine, theirs in zip(cut[0].parameters(), whole[0].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-6)
    assert (whole[0].embedding - sorting.model().embedding).abs().max() > 1e-4
    assert all(m.max_delta == 0 for m in (*cut[1], *whole[1]))


@pytest.mark.parametrize("slice_tokens", [None, 3])
def test_a_run_that_stops_and_resumes_ends_at_the_same_bits(slice_tokens: int | None) -> None:
    settings = replace(DAPO, max_steps=3, schedule=STEADY, mini_batches=2)
    rollout_settings = replace(ROLLOUTS, slice_tokens=slice_tokens)
    whole = sorting.model("lockstep")
    through = list(grpo(whole, Optimizer(whole, SMOOTH), source(whole, rollout_settings), settings))

    model = sorting.model("lockstep")
    optimizer, first = Optimizer(model, SMOOTH), source(model, rollout_settings)
    list(islice(grpo(model, optimizer, first, settings), 1))
    resumed = sorting.model("lockstep", seed=9)
    resumed.load_state_dict(model.state_dict())
    second_optimizer = Optimizer(resumed, SMOOTH)
    second_optimizer.load_state_tensors(optimizer.state_tensors())
    second = source(resumed, rollout_settings)
    second.restore(first.state)
    rest = list(grpo(resumed, second_optimizer, second, settings, first_step=1))
    assert [m.reward for m in rest] == [m.reward for m in through[1:]]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_partial_rollouts_are_learnt_from_with_their_own_old_probabilities() -> None:
    model = sorting.model("lockstep")
    rollouts = source(model, replace(ROLLOUTS, slice_tokens=2))
    metrics = list(
        grpo(model, Optimizer(model, SMOOTH), rollouts, replace(SETTINGS, max_steps=5, lockstep_check="all"))
    )
    assert any(m.lag > 0 for m in metrics), "some answers were begun by older weights"
    assert any(m.kl_old > 0 for m in metrics), "whose probabilities are not the present ones"
    assert all(m.max_delta == 0 and m.compared > 0 for m in metrics)


def test_the_check_of_all_scores_every_token_before_any_update() -> None:
    _, metrics = run(replace(SETTINGS, mini_batches=4, lockstep_check="all"))
    for m in metrics:
        assert (m.max_delta, m.compared > m.tokens) == (0.0, True)  # the first mini-batch once more


def test_a_run_stops_where_the_engine_is_not_the_trainer() -> None:
    model = sorting.model("lockstep")
    rollouts = source(model, snapshot=True)
    steps = grpo(model, Optimizer(model, SMOOTH), rollouts, SETTINGS)
    assert next(steps).max_delta == 0
    with torch.no_grad():
        layer = rollouts.engine_model.layers[1]
        layer.mlp.down.weight[3, 5] += 0.5
    with pytest.raises(LockstepError, match=r"first operation to differ is layers\.1\.mlp\.down"):
        next(steps)


class Constant:
    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        return [0.5] * len(completions)


class Rare:
    """Only answers that begin with a 3 are worth something."""

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        return [float(c.answer.startswith("3")) for c in completions]


def test_dynamic_sampling_keeps_only_groups_that_teach() -> None:
    model = sorting.model("lockstep")
    rollouts = source(model, scorer=Rare())
    [metrics] = grpo(model, Optimizer(model, SMOOTH), rollouts, replace(DAPO, max_steps=1, schedule=STEADY))
    assert 0 < metrics.teaching < 1
    assert all(len({t.reward for t in g}) > 1 for g in metrics.groups)
    assert len(metrics.groups) == ROLLOUTS.prompts_per_step
    assert rollouts.state.position > ROLLOUTS.prompts_per_step, "further prompts were asked"


def test_no_group_that_teaches_is_said_with_the_rewards() -> None:
    model = sorting.model("lockstep")
    rollouts = source(model, scorer=Constant())
    settings = replace(DAPO, max_rounds=2)
    with pytest.raises(
        MainspringError, match=r"in all 6 groups of 2 rounds .*mean is 0\.5.*nothing to learn"
    ):
        next(grpo(model, Optimizer(model, SMOOTH), rollouts, settings))


def test_the_kl_to_a_reference_holds_the_policy_near_it() -> None:
    def distance(weight: float) -> float:
        _, metrics = run(
            replace(
                SETTINGS, max_steps=8, kl_loss=weight, kl_estimator="k3_with_k2_gradient", mini_batches=2
            ),
            reference=sorting.model("lockstep"),
        )
        return metrics[-1].kl_reference

    assert distance(10.0) < 0.5 * distance(0.001)


def test_an_answer_near_its_budget_is_penalised() -> None:
    found = overlong_penalty(torch.tensor([1, 6, 7, 8, 10]), max_tokens=10, buffer=4)
    assert found.tolist() == [0.0, 0.0, -0.25, -0.5, -1.0]
    with pytest.raises(ConfigError, match="buffer must be within"):
        overlong_penalty(torch.tensor([1]), max_tokens=10, buffer=11)


def test_what_does_not_fit_is_refused() -> None:
    model = sorting.model()
    lonely = source(model, replace(ROLLOUTS, group_size=1))
    with pytest.raises(ConfigError, match="group_size = 1"):
        next(grpo(model, Optimizer(model, SMOOTH), lonely, SETTINGS))
    with pytest.raises(ConfigError, match="needs a reference"):
        run(replace(SETTINGS, kl_loss=0.1))
    with pytest.raises(ConfigError, match="epochs = 0"):
        run(replace(SETTINGS, epochs=0))


class Huge:
    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        return [math.inf if i % 2 else 0.0 for i in range(len(completions))]


def test_a_loss_that_is_no_number_stops_the_run() -> None:
    model = sorting.model("fast")
    rollouts = source(model, scorer=Huge())
    with pytest.raises(MainspringError, match=r"step 1: .* lower the learning rate"):
        next(grpo(model, Optimizer(model, SMOOTH), rollouts, SETTINGS))
