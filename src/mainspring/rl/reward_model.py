"""Reward models: trained on pairs so that the preferred answer scores higher, then used as a reward.

    judge = ValueModel.of(policy, "sequence")
    for metrics in islice(reward_model(judge, Optimizer(judge, OptimizerSection(lr=1e-5)), pairs, settings), 1000):
        print(metrics)
    rollouts = Rollouts(policy, prompts, texts, ModelRewards(judge))

The score of an answer is the head's number at its last token. What is learnt is P(chosen over rejected) = σ(r_w − r_l)
(Bradley and Terry, Biometrika 39, 1952; Ouyang et al., arXiv 2203.02155, eq. 1). A run is (model, optimizer, step):
with these three it continues to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mainspring.errors import ConfigError, MainspringError
from mainspring.rl.math.preferences import bradley_terry_loss
from mainspring.rl.rewards import Completion
from mainspring.rl.samples import Pair, cut, drawn
from mainspring.rl.step_settings import SampleSettings
from mainspring.rl.value_model import ValueModel
from mainspring.train.optimizer import Optimizer


@dataclass(frozen=True)
class RewardModelSettings(SampleSettings):
    """How a run steps. A prompt brings one pair."""

    margin: float = 0.0
    """By how much the chosen answer's score must be above the other's."""


@dataclass(frozen=True)
class Ranking:
    """How a reward model ranks pairs."""

    loss: float
    accuracy: float
    """Share of pairs whose chosen answer scores higher."""
    difference: float
    """Mean of the chosen answer's score less the other's."""


@dataclass(frozen=True)
class RewardModelMetrics:
    """Of one step, before the weights moved."""

    step: int
    ranking: Ranking
    grad_norm: float
    """Before clipping."""


def reward_model(
    model: ValueModel,
    optimizer: Optimizer,
    pairs: Sequence[Pair],
    settings: RewardModelSettings,
    *,
    first_step: int = 0,
) -> Iterator[RewardModelMetrics]:
    """Trains up to max_steps; each `next` is one step. first_step: the steps already done by a run that resumes.

    Raises ConfigError for settings that do not fit the pairs, MainspringError where the loss is no longer finite.
    """
    steps = drawn(len(pairs), settings.prompts_per_step, settings.seed, first_step)
    for step in range(first_step, settings.max_steps):
        batch = [pairs[i] for i in next(steps)]
        differences: list[Tensor] = []
        for run in cut([len(pair) for pair in batch], settings.tokens_per_microbatch):
            scores = _scores(model, [batch[i] for i in run])  # [n, 2]
            losses = bradley_terry_loss(scores[:, 0], scores[:, 1], margin=settings.margin)
            (losses.sum() / len(batch)).backward()
            optimizer.accumulate()
            differences.append((scores[:, 0] - scores[:, 1]).detach())
        ranking = _ranking(torch.cat(differences), settings.margin)
        grad_norm = optimizer.step(settings.lr_factor(step), settings.clip_norm)
        if not (math.isfinite(ranking.loss) and math.isfinite(grad_norm)):
            raise MainspringError(
                f"step {step + 1}: the loss is {ranking.loss} and the gradient's norm {grad_norm}; "
                "lower the learning rate"
            )
        yield RewardModelMetrics(step + 1, ranking, grad_norm)


@torch.no_grad()
def rank(
    model: ValueModel, pairs: Sequence[Pair], tokens_per_microbatch: int = 8192, *, margin: float = 0.0
) -> Ranking:
    """How the model ranks pairs, those held out for instance. Raises ConfigError."""
    if not pairs:
        raise ConfigError("there are no pairs; give at least one")
    runs = cut([len(pair) for pair in pairs], tokens_per_microbatch)
    scores = torch.cat([_scores(model, [pairs[i] for i in run]) for run in runs])
    return _ranking(scores[:, 0] - scores[:, 1], margin)


class ModelRewards:
    """A reward model as a `Scorer`: the scores of conversations' tokens as they were sampled, none of which fails.

    The policy's tokens must be the reward model's: one tokenizer for both.
    """

    def __init__(self, model: ValueModel, tokens_per_microbatch: int = 8192) -> None:
        self._model = model
        self._tokens_per_microbatch = tokens_per_microbatch

    @torch.no_grad()
    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        """A reward for each. Raises ConfigError for a completion without tokens or with too many."""
        if not all(completion.tokens for completion in completions):
            raise ConfigError(
                "a reward model scores tokens, and a completion has none; take those of rollouts"
            )
        runs = cut([len(completion.tokens) for completion in completions], self._tokens_per_microbatch)
        scores: list[float | None] = []
        for run in runs:
            scores += self._model.scores([completions[i].tokens for i in run]).tolist()
        return scores


def _scores(model: ValueModel, pairs: Sequence[Pair]) -> Tensor:
    """[n, 2], with gradients: of the chosen answer and of the rejected one."""
    return model.scores([s.tokens for pair in pairs for s in (pair.chosen, pair.rejected)]).view(-1, 2)


def _ranking(differences: Tensor, margin: float) -> Ranking:
    losses = bradley_terry_loss(differences, torch.zeros_like(differences), margin=margin)
    return Ranking(
        loss=float(losses.mean()),
        accuracy=float((differences > 0).double().mean()),
        difference=float(differences.mean()),
    )
