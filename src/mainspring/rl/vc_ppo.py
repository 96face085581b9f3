"""Value-calibrated PPO (VC-PPO; Yuan et al., arXiv 2503.01491): PPO whose critic is taught before it teaches.

Two changes to `ppo`: in the first steps the policy stays and the critic learns the returns of what it writes (value
pretraining), and the critic's λ is its own (decoupled GAE). At λ = 1 its targets are Monte-Carlo returns, which a
wrong critic does not bias; the policy keeps the lower variance of a smaller one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from mainspring.model.decoder import Decoder
from mainspring.parallel.mesh import Group
from mainspring.rl.critic import Critic, Estimate
from mainspring.rl.math.advantages import decoupled_gae
from mainspring.rl.policy_update import ALONE, PolicyOptimizer
from mainspring.rl.ppo import PolicyLoss, PpoSettings, ppo
from mainspring.rl.ppo_metrics import PpoMetrics
from mainspring.rl.rollouts import Rollouts
from mainspring.rl.samples import PolicyModel
from mainspring.rl.trajectories import Packed


@dataclass(frozen=True, kw_only=True)
class VcPpoSettings(PpoSettings):
    """As PPO's; `lam` is the policy's alone."""

    warmup_steps: int = 50
    """Of value pretraining: enough for `value_loss` to settle and `explained_variance` to rise."""
    critic_lam: float = 1.0


def vc_ppo(
    model: PolicyModel,
    optimizer: PolicyOptimizer,
    critic: Critic,
    rollouts: Rollouts,
    settings: VcPpoSettings,
    *,
    reference: Decoder | None = None,
    first_step: int = 0,
    estimate: Estimate | None = None,
    loss: PolicyLoss | None = None,
    group: Group = ALONE,
) -> Iterator[PpoMetrics]:
    """As `ppo`; its steps begin with those of value pretraining."""
    return ppo(
        model,
        optimizer,
        critic,
        rollouts,
        settings,
        reference=reference,
        first_step=first_step,
        estimate=estimate if estimate is not None else decoupled_estimate(settings),
        loss=loss,
        group=group,
    )


def decoupled_estimate(settings: VcPpoSettings) -> Estimate:
    """Advantages of the policy's λ, returns of the critic's."""

    def estimate(batch: Packed, rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return decoupled_gae(
            rewards,
            values,
            batch.lengths,
            gamma=settings.gamma,
            policy_lam=settings.lam,
            critic_lam=settings.critic_lam,
        )

    return estimate
