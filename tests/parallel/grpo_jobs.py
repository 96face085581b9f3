"""Jobs of the pool: GRPO on sorting over data-parallel ranks, and on one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mainspring.model.checkpoint import load_model
from mainspring.parallel.streaming import stream_weights
from mainspring.rl.grpo import GrpoSettings, grpo
from mainspring.rl.grpo_metrics import GrpoMetrics
from mainspring.rl.ranks import RankRollouts
from mainspring.rl.rewards import Completion
from mainspring.rl.rollout_settings import RolloutSettings
from mainspring.rl.rollouts import Rollouts
from mainspring.train.optimizer import Optimizer
from mainspring.train.rank_optimizer import RankOptimizer
from mainspring.train.recipe import OptimizerSection, ScheduleSection
from parallel.scoring import units_of
from rl import sorting

STEPS = 3
# A large eps makes AdamW's step a smooth function of the gradient, so that equal weights mean equal gradients.
SMOOTH = OptimizerSection(lr=0.1, eps=1.0, weight_decay=0.0)
SETTINGS = GrpoSettings(
    max_steps=STEPS,
    tokens_per_microbatch=40,
    loss_mean="tokens",
    importance_cap=2.0,
    lockstep_check="all",
    schedule=ScheduleSection(kind="constant", warmup_fraction=0.0),
)
ROLLOUTS = RolloutSettings(prompts_per_step=4, group_size=3, max_tokens=8, seed=2)


def on_one(directory: str) -> tuple[list[GrpoMetrics], dict[str, Tensor]]:
    """(metrics, the weights in the end)."""
    model = load_model(directory, dtype=torch.float32, numerics="lockstep")
    rollouts = Rollouts(model, sorting.prompts(40, 3), sorting.TEXTS, sorting.Graded(), ROLLOUTS)
    metrics = list(grpo(model, Optimizer(model, SMOOTH), rollouts, SETTINGS))
    return metrics, {name: tensor.detach() for name, tensor in model.hf_tensors().items()}


def over_ranks(directory: str, layout: str) -> tuple[list[GrpoMetrics], float, dict[str, Any]]:
    """(metrics of the rank, seconds of the last resharding, the weights in the end)."""
    units = units_of(directory, layout, torch.float32, "lockstep")
    prompts = sorting.prompts(40, 3)
    rollouts = RankRollouts(units, prompts, sorting.TEXTS, sorting.Graded(), ROLLOUTS)
    group = units.mesh.group("dp")
    metrics = list(grpo(units.model, RankOptimizer(units, SMOOTH), rollouts, SETTINGS, group=group))
    weights = {name: tensor.numpy() for name, tensor in stream_weights(units)}
    return metrics, rollouts.resharding.seconds, weights


class _Forgetful(sorting.Graded):
    """Gives the first two answers of a step a reward, and drops the others."""

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        return [reward if i < 2 else None for i, reward in enumerate(super().score(completions))]


def with_dropped_answers(directory: str) -> list[tuple[int, float]]:
    """(answers of the rank, the gradient's norm) of every step; the second rank has two answers, the first six."""
    units = units_of(directory, "dp=2", torch.float32, "lockstep")
    group = units.mesh.group("dp")
    scorer = _Forgetful() if group.rank == 1 else sorting.Graded()
    rollouts = RankRollouts(units, sorting.prompts(40, 3), sorting.TEXTS, scorer, ROLLOUTS)
    settings = replace(SETTINGS, mini_batches=6)
    steps = grpo(units.model, RankOptimizer(units, SMOOTH), rollouts, settings, group=group)
    return [(sum(map(len, metrics.groups)), metrics.grad_norm) for metrics in steps]
