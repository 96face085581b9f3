"""What learns in a run from a recipe, on one device: the model, its optimizer and critic, and their checkpoints.

`rank_learner.RankLearner` is the same over the ranks that torchrun has started; a run sees a `Learner` of either kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from mainspring.engine.config import EngineConfig
from mainspring.engine.sampling_params import SamplingParams
from mainspring.formats.tokenizer import Tokenizer
from mainspring.model.checkpoint import load_model
from mainspring.model.decoder import Decoder
from mainspring.parallel.mesh import Group
from mainspring.rl.ahead import RolloutsAhead
from mainspring.rl.checkpoint import ADAPTER, RlState, load_critic, load_run_optimizers, save_run
from mainspring.rl.critic import Critic
from mainspring.rl.environment import Environment
from mainspring.rl.lora import LoraDecoder
from mainspring.rl.policy_update import ALONE, PolicyOptimizer
from mainspring.rl.prompts import Prompt, Texts
from mainspring.rl.ray_rollouts import RayRollouts
from mainspring.rl.recipe import WITH_CRITIC, RlRecipe
from mainspring.rl.rewards import Scorer
from mainspring.rl.rollouts import Rollouts
from mainspring.rl.samples import PolicyModel
from mainspring.rl.value_model import ValueModel
from mainspring.train.optimizer import Optimizer


@dataclass(frozen=True)
class Asked:
    """What rollouts are made of, beside the model and the recipe's own settings."""

    prompts: Sequence[Prompt]
    texts: Texts
    scorer: Scorer
    sampling: SamplingParams
    engine: EngineConfig
    environment: Callable[[], Environment] | None


class Learner(Protocol):
    """Its attributes do not change during a run."""

    @property
    def model(self) -> PolicyModel: ...

    @property
    def optimizer(self) -> PolicyOptimizer: ...

    @property
    def critic(self) -> Critic | None: ...

    @property
    def group(self) -> Group:
        """The ranks that learn together."""
        ...

    @property
    def writes_groups(self) -> bool:
        """Whether no other rank has the same groups and logs them."""
        ...

    def rollouts(self, asked: Asked) -> Rollouts:
        """By an engine with this model's weights. Raises ConfigError."""
        ...

    def load_optimizers(self, start: Path) -> None:
        """Puts the state of a checkpoint back. Raises CheckpointError."""
        ...

    def save(self, output: Path, tokenizer: Tokenizer, state: RlState, keep: int) -> Path:
        """Writes OUTPUT/step-N (`rl.checkpoint`). Raises CheckpointError or OSError; older checkpoints stay."""
        ...


class DeviceLearner:
    """See `Learner`."""

    group = ALONE
    writes_groups = True

    def __init__(self, recipe: RlRecipe, directory: Path, device: torch.device, start: Path | None) -> None:
        """directory: of the weights; start: the checkpoint that is continued. Raises what loading them raises."""
        self._recipe = recipe
        self.model = _load(recipe, directory, device, start)
        trained = self.model.lora if isinstance(self.model, LoraDecoder) else self.model
        self.optimizer = Optimizer(trained, recipe.optimizer)
        self.critic = _critic(recipe, self.model, start)

    def rollouts(self, asked: Asked) -> Rollouts:
        settings, how = self._recipe.rollouts, self._recipe.engine
        parts = (self.model, asked.prompts, asked.texts, asked.scorer, settings)
        sampling, engine, environment = asked.sampling, asked.engine, asked.environment
        if how.ahead:
            return RolloutsAhead(*parts, sampling=sampling, engine=engine, environment=environment)
        if how.ray_workers:
            return RayRollouts(
                *parts,
                workers=how.ray_workers,
                address=how.ray_address or None,
                sampling=sampling,
                engine=engine,
                environment=environment,
            )
        return Rollouts(
            *parts, sampling=sampling, engine=engine, environment=environment, snapshot=how.snapshot
        )

    def load_optimizers(self, start: Path) -> None:
        load_run_optimizers(start, self.optimizer, self.critic, self.model)

    def save(self, output: Path, tokenizer: Tokenizer, state: RlState, keep: int) -> Path:
        return save_run(output, self.model, self.optimizer, self.critic, tokenizer, state, keep)


def _load(recipe: RlRecipe, directory: Path, device: torch.device, start: Path | None) -> Decoder:
    """The model to train; a reward model begins as a copy of a policy, or as what a former run has made of it."""
    model = recipe.model
    if recipe.algorithm == "reward_model" and start is not None:
        return ValueModel.load(directory, device=device, dtype=model.dtype, numerics=model.numerics)
    policy = load_model(directory, device=device, dtype=model.dtype, numerics=model.numerics)
    if recipe.algorithm == "reward_model":
        return ValueModel.of(policy, "sequence")
    if not recipe.lora.rank:
        return policy
    adapted = LoraDecoder(policy, recipe.lora)
    if start is not None:
        adapted.lora.load(start / ADAPTER)
    return adapted


def _critic(recipe: RlRecipe, model: Decoder, start: Path | None) -> Critic | None:
    if recipe.algorithm not in WITH_CRITIC:
        return None
    if start is not None:
        return load_critic(start, model, recipe.critic)
    values = ValueModel.of(model)
    return Critic(values, Optimizer(values, recipe.critic))
