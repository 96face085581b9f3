"""What a step of PPO and its relatives reports."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mainspring.rl.critic import Experience
from mainspring.rl.lockstep import LockstepCheck
from mainspring.rl.math import kl
from mainspring.rl.math.value_loss import explained_variance
from mainspring.rl.policy_metrics import PolicyMetrics
from mainspring.rl.rollouts import RolloutReport
from mainspring.rl.trajectories import Group


@dataclass(frozen=True, kw_only=True)
class PpoMetrics(PolicyMetrics):
    """What the policy's optimizer sees is nan while the policy stays."""

    value_loss: float
    value_grad_norm: float
    explained_variance: float
    """Of the returns, by the values before the step."""


def ppo_metrics(
    step: int,
    groups: Sequence[Group],
    experience: Experience,
    totals: Mapping[str, float],
    policy_learns: bool,
    check: LockstepCheck,
    report: RolloutReport,
    update_seconds: float,
) -> PpoMetrics:
    """totals: of `policy_update.add_sums` over the step's mini-batches. step: those done before it."""
    batch, log_probs = experience.batch, experience.reference_log_probs

    def of_policy(name: str, per: str) -> float:
        return totals[name] / totals[per] if policy_learns else math.nan

    return PpoMetrics(
        step=step + 1,
        reward=float(batch.rewards.mean()),
        length=float(batch.lengths.double().mean()),
        finished=float(batch.finished.double().mean()),
        tokens=batch.num_tokens,
        loss=of_policy("loss", "mini_batches"),
        entropy=of_policy("entropy", "tokens"),
        clip_fraction=of_policy("clipped", "tokens"),
        kl_old=of_policy("kl_old", "tokens"),
        kl_reference=math.nan if log_probs is None else float(kl.k3(batch.old_log_probs, log_probs).mean()),
        grad_norm=of_policy("grad_norm", "mini_batches"),
        value_loss=totals["value_loss"] / totals["mini_batches"],
        value_grad_norm=totals["value_grad_norm"] / totals["mini_batches"],
        explained_variance=float(explained_variance(experience.values, experience.returns)),
        max_delta=max(check.max_delta, report.max_delta),
        compared=check.num_compared + report.compared,
        lag=step - float(batch.versions.double().mean()),
        dropped=report.dropped,
        rollout_seconds=report.seconds,
        reward_seconds=report.reward_seconds,
        update_seconds=update_seconds,
        groups=groups,
        advantages=[float(a.mean()) for a in experience.advantages.split(batch.lengths.tolist())],
    )
