"""VAPO (Yue et al., arXiv 2504.05118): VC-PPO for answers of very different lengths and rewards that are rare.

What it changes of `vc_ppo`: the policy's λ grows with an answer's length; all tokens weigh the same in the loss; a
ratio may rise further than it may fall; and answers that are right are also imitated. Its group sampling, fewer prompts
with many answers each, is `RolloutSettings.group_size`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mainspring.errors import ConfigError
from mainspring.model.decoder import Decoder
from mainspring.parallel.mesh import Group
from mainspring.rl.critic import Critic, Estimate, Experience
from mainspring.rl.math.advantages import decoupled_gae, length_adaptive_lambda
from mainspring.rl.math.aggregation import mean_over_tokens
from mainspring.rl.math.segments import spread
from mainspring.rl.policy_update import ALONE, MicroBatch, PolicyOptimizer, TokenLoss, total
from mainspring.rl.ppo import PolicyLoss, clipped_loss
from mainspring.rl.ppo_metrics import PpoMetrics
from mainspring.rl.rollouts import Rollouts
from mainspring.rl.samples import PolicyModel
from mainspring.rl.trajectories import Packed
from mainspring.rl.vc_ppo import VcPpoSettings, decoupled_estimate, vc_ppo


@dataclass(frozen=True, kw_only=True)
class VapoSettings(VcPpoSettings):
    """As VC-PPO's, with the paper's values of what VAPO adds."""

    clip_high: float = 0.28
    loss_mean: Literal["sequences", "tokens"] = "tokens"
    alpha: float | None = 0.05
    """The policy's λ of an answer of l tokens is 1 − 1/(alpha · l); None: `lam` for all."""
    shortest_lam: float = 0.8
    """The least λ, which short answers get: their formula's would be 0 or below."""
    positive_nll: float = 0.1
    """μ, the weight of imitating right answers; 0 turns it off."""
    right_from: float = 1.0
    """An answer is right from this reward on."""


def vapo(
    model: PolicyModel,
    optimizer: PolicyOptimizer,
    critic: Critic,
    rollouts: Rollouts,
    settings: VapoSettings,
    *,
    reference: Decoder | None = None,
    first_step: int = 0,
    group: Group = ALONE,
) -> Iterator[PpoMetrics]:
    """As `vc_ppo`."""
    if settings.positive_nll < 0:
        raise ConfigError(f"positive_nll must be at least 0, got {settings.positive_nll}")
    return vc_ppo(
        model,
        optimizer,
        critic,
        rollouts,
        settings,
        reference=reference,
        first_step=first_step,
        estimate=length_adaptive_estimate(settings),
        loss=imitating_loss(settings),
        group=group,
    )


def length_adaptive_estimate(settings: VapoSettings) -> Estimate:
    """Advantages of each answer's own λ, returns of the critic's."""
    if settings.alpha is None:
        return decoupled_estimate(settings)
    alpha = settings.alpha

    def estimate(batch: Packed, rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        written = torch.ones_like(values, dtype=torch.bool)
        lam = length_adaptive_lambda(written, batch.lengths, alpha=alpha, low=settings.shortest_lam)
        return decoupled_gae(
            rewards,
            values,
            batch.lengths,
            gamma=settings.gamma,
            policy_lam=lam,
            critic_lam=settings.critic_lam,
        )

    return estimate


def imitating_loss(settings: VapoSettings) -> PolicyLoss:
    """PPO's loss + μ · the mean −log π over the tokens of the right answers ("Positive Example LM Loss")."""
    clipped = clipped_loss(settings)

    def loss(mini: Experience) -> TokenLoss:
        plain = clipped(mini)
        if not settings.positive_nll:
            return plain
        right = mini.batch.rewards >= settings.right_from  # [n of the mini-batch]
        of_rank = float(mini.batch.lengths[right].sum())
        num_tokens = int(total([of_rank], mini.group, mini.values.device)[0])
        if num_tokens == 0:
            return plain

        def share_of(micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
            share, sums = plain(micro)
            of_right = spread(right[micro.trajectories], micro.lengths)
            nll = mean_over_tokens(-micro.log_probs, of_right, num_tokens=num_tokens)
            return share + settings.positive_nll * nll, sums

        return share_of

    return loss
