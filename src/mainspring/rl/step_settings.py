"""Settings of a run's steps that algorithms share; what is an algorithm's own stands in its file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mainspring.errors import ConfigError
from mainspring.train.recipe import ScheduleSection
from mainspring.train.schedule import learning_rate_factor


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """Of every algorithm."""

    max_steps: int = 1000
    """The learning rate's schedule ends here, and so does the run."""
    tokens_per_microbatch: int = 8192
    """Of prompts and answers together. It decides memory and speed, not the result."""
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    clip_norm: float = 1.0
    seed: int = 0

    def lr_factor(self, step: int, first: int = 0) -> float:
        """Of the middle of a step, so that neither the first nor the last moves nothing; the schedule begins at `first`
        (before it, the factor is its first)."""
        done = max(0.0, (step - first + 0.5) / (self.max_steps - first))
        return learning_rate_factor(self.schedule, done)


@dataclass(frozen=True)
class SampleSettings(StepSettings):
    """Of algorithms that learn from samples or pairs in a file."""

    prompts_per_step: int = 32
    """A prompt brings one answer, or one pair of them."""


@dataclass(frozen=True, kw_only=True)
class PolicySettings(StepSettings):
    """Of algorithms that learn from rollouts; how much is written in a step is `RolloutSettings`' affair."""

    epochs: int = 1
    mini_batches: int = 1
    """Of an epoch; each optimizer takes a step for every mini-batch."""
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    entropy_bonus: float = 0.0
    kl_loss: float = 0.0
    """β of the KL to the reference as a term of the loss."""
    importance_cap: float | None = None
    """Where answers are of older weights or other numerics: clip the ratio to the weights at the step's beginning, and
    weigh each token by their probability over the writers', at most this. Costs a forward pass."""
    lockstep_check: Literal["first", "all"] = "first"
    """Hold the first mini-batch's log-probabilities against the engine's, or all of a step's before any update."""
    carried_checks: int = 4
    """Unfinished conversations that are checked in each step, while the weights that wrote them are there; and
    answers, where the policy stays and computes no log-probabilities of its own."""

    def check(self) -> None:
        """Raises ConfigError for a number below 1."""
        for name in ("epochs", "mini_batches", "max_steps", "tokens_per_microbatch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)} must be at least 1")
