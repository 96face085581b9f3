"""What a policy has done: the tokens it wrote, with what probability, by which weights, and what that was worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mainspring.errors import ConfigError
from mainspring.rl.samples import Sample


@dataclass(frozen=True)
class Trajectory:
    """One conversation of a rollout. Raises ConfigError where the parts do not fit (and as `Sample` does)."""

    prompt: int
    """Which of the rollouts' prompts it answers."""
    tokens: tuple[int, ...]
    written: tuple[bool, ...]
    """Of each token: the policy wrote it; others are the prompt's and the environment's."""
    log_probs: tuple[float, ...]
    """The engine's, of each written token, at the sampling temperature; float32 values held exactly."""
    versions: tuple[int, ...]
    """Of each written token: the version of the weights that wrote it."""
    reward: float
    finished: bool
    """It ended by itself; else its budget of tokens or turns cut it off."""

    def __post_init__(self) -> None:
        counts = (self.sample.num_written, len(self.log_probs), len(self.versions))
        if len(set(counts)) != 1:
            raise ConfigError(
                f"a trajectory has {counts[0]} written tokens, {counts[1]} log-probabilities and {counts[2]} "
                "versions; each written token needs one of either"
            )

    @property
    def sample(self) -> Sample:
        return Sample(self.tokens, self.written)

    @property
    def num_written(self) -> int:
        return len(self.log_probs)


Group = list[Trajectory]
"""All answers to one prompt; fewer than the group's size where a reward failed."""


@dataclass(frozen=True)
class Packed:
    """Trajectories end to end, reduced to their written tokens: [W] of all of them, [N] of the trajectories.

    A critic's values at the places that predict written tokens lie in the same order, so that no tool's token takes
    part in any formula.
    """

    samples: tuple[Sample, ...]
    lengths: Tensor  # [N] int64, written tokens of each
    old_log_probs: Tensor  # [W] float32
    versions: Tensor  # [W] int64
    rewards: Tensor  # [N] float32
    finished: Tensor  # [N] bool

    @property
    def num_tokens(self) -> int:
        """Written ones."""
        return self.old_log_probs.shape[0]

    def pick(self, per_token: Tensor, chosen: Sequence[int]) -> Tensor:
        """Of values [W] those of the chosen trajectories' tokens, end to end."""
        pieces = per_token.split(self.lengths.tolist())
        return torch.cat([pieces[i] for i in chosen])

    @property
    def last(self) -> Tensor:
        """[N] int64: where each trajectory's last written token lies."""
        return self.lengths.cumsum(0) - 1


def pack(trajectories: Sequence[Trajectory], device: torch.device | str = "cpu") -> Packed:
    """Raises ConfigError if there are none."""
    if not trajectories:
        raise ConfigError("there are no trajectories to learn from")
    return Packed(
        samples=tuple(t.sample for t in trajectories),
        lengths=torch.tensor([t.num_written for t in trajectories], device=device),
        old_log_probs=torch.tensor([p for t in trajectories for p in t.log_probs], device=device),
        versions=torch.tensor([v for t in trajectories for v in t.versions], device=device),
        rewards=torch.tensor([t.reward for t in trajectories], dtype=torch.float32, device=device),
        finished=torch.tensor([t.finished for t in trajectories], device=device),
    )
