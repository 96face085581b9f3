"""Rollouts by Ray's actors on this machine: slow, because Ray takes its time to start."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from mainspring.errors import EngineDeadError, LockstepError
from mainspring.rl.environment import Calculator
from mainspring.rl.grpo import GrpoSettings, grpo
from mainspring.rl.ray_rollouts import RayRollouts
from mainspring.rl.rollout_settings import RolloutSettings
from mainspring.rl.rollouts import Rollouts
from mainspring.rl.run import RlRun
from mainspring.train.metrics import Progress
from mainspring.train.optimizer import Optimizer
from mainspring.train.recipe import OptimizerSection, ScheduleSection
from rl import sorting
from rl.small_runs import lines, prepare, recipe

if importlib.util.find_spec("ray") is None:
    pytest.skip("needs mainspring[ray]", allow_module_level=True)

SETTINGS = RolloutSettings(prompts_per_step=4, group_size=3, max_tokens=8, seed=2)
STEPS = GrpoSettings(
    max_steps=4, schedule=ScheduleSection(kind="constant", warmup_fraction=0.0), lockstep_check="all"
)
OPTIMIZER = OptimizerSection(lr=3e-3, weight_decay=0.0)


@pytest.mark.slow
def test_workers_write_what_one_engine_writes_also_after_one_is_lost() -> None:
    alone = sorting.model("lockstep")
    prompts, held_out = sorting.prompts(40, 3), sorting.prompts(6, 9)
    local = Rollouts(alone, prompts, sorting.TEXTS, sorting.Graded(), SETTINGS)
    expected = list(grpo(alone, Optimizer(alone, OPTIMIZER), local, STEPS))

    model = sorting.model("lockstep")
    with RayRollouts(
        model, prompts, sorting.TEXTS, sorting.Graded(), SETTINGS, workers=2, max_restarts=1
    ) as rollouts:
        found = []
        for metrics in grpo(model, Optimizer(model, OPTIMIZER), rollouts, STEPS):
            found.append(metrics)
            if metrics.step == 2:
                rollouts._ray.kill(rollouts._workers[0])
        assert rollouts.restarts == 1
        assert [m.groups for m in found] == [m.groups for m in expected]
        assert all(m.max_delta == 0 and m.compared > 0 for m in found)
        assert rollouts.answer(held_out, samples=2) == local.answer(held_out, samples=2)

        rollouts._expected = "another"
        with pytest.raises(LockstepError, match="checksum"):
            rollouts.collect()
        rollouts._ray.kill(rollouts._workers[1])
        with pytest.raises(EngineDeadError, match="more than max_restarts = 1"):
            rollouts.collect()


@pytest.mark.slow
def test_slices_and_environments_go_on_in_any_worker() -> None:
    model = sorting.model("lockstep")
    prompts = sorting.prompts(40, 3)
    settings = replace(SETTINGS, slice_tokens=3)
    local = Rollouts(model, prompts, sorting.TEXTS, sorting.Graded(), settings, environment=Calculator)
    with RayRollouts(
        model,
        prompts,
        sorting.TEXTS,
        sorting.Graded(),
        settings,
        workers=2,
        environment=Calculator,
    ) as rollouts:
        for _ in range(3):
            assert rollouts.collect() == local.collect()


@pytest.mark.slow
def test_a_recipe_asks_for_workers_also_with_an_environment(tmp_path: Path) -> None:
    folder = prepare(tmp_path)
    changes = [
        "grpo.max_steps=2",
        'reward.environment="rl.reward_functions:MoodyWorld"',
        "data.validation=''",
    ]
    for name, more in (("here", []), ("there", ["engine.ray_workers=2"])):
        settings = recipe(folder, "grpo", *changes, *more, f"output={str(folder / name)!r}")
        assert RlRun(settings, show=Progress(silent=True)).run().step == 2
    written = lines(folder / "here" / "rollouts.jsonl")
    assert len(written) == 6
    assert lines(folder / "there" / "rollouts.jsonl") == written
