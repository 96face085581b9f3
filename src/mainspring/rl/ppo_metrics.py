"""What a step of PPO and its relatives reports."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mainspring.parallel import mesh
from mainspring.rl.critic import Experience
from mainspring.rl.lockstep import LockstepCheck
from mainspring.rl.math.value_loss import explained_variance
from mainspring.rl.policy_metrics import PolicyMetrics, over_ranks
from mainspring.rl.policy_update import total
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
    ranks: mesh.Group,
) -> PpoMetrics:
    """totals: of `policy_update.add_sums` over the step's mini-batches. step: those done before it. ranks: all of which
    call this together."""
    batch = experience.batch
    own = {"reward": float(batch.rewards.double().sum())}
    of = over_ranks(batch, experience.reference_log_probs, check, report, update_seconds, own, ranks)

    def of_policy(name: str, per: str) -> float:
        return totals[name] / totals[per] if policy_learns else math.nan

    return PpoMetrics(
        step=step + 1,
        reward=of["reward"] / of["answers"],
        length=of["tokens"] / of["answers"],
        finished=of["finished"] / of["answers"],
        tokens=int(of["tokens"]),
        loss=of_policy("loss", "mini_batches"),
        entropy=of_policy("entropy", "tokens"),
        clip_fraction=of_policy("clipped", "tokens"),
        kl_old=of_policy("kl_old", "tokens"),
        kl_reference=of["kl_reference"] / of["tokens"],
        grad_norm=of_policy("grad_norm", "mini_batches"),
        value_loss=totals["value_loss"] / totals["mini_batches"],
        value_grad_norm=totals["value_grad_norm"] / totals["mini_batches"],
        explained_variance=_explained(experience, ranks),
        max_delta=of["max_delta"],
        compared=int(of["compared"]),
        lag=step - of["versions"] / of["tokens"],
        dropped=int(of["dropped"]),
        rollout_seconds=of["rollout_seconds"],
        reward_seconds=of["reward_seconds"],
        update_seconds=of["update_seconds"],
        groups=groups,
        advantages=[float(a.mean()) for a in experience.advantages.split(batch.lengths.tolist())],
    )


def _explained(experience: Experience, ranks: mesh.Group) -> float:
    """`math.value_loss.explained_variance` of all ranks' tokens."""
    if ranks.size == 1:
        return float(explained_variance(experience.values, experience.returns))
    returns = experience.returns.double()
    left = returns - experience.values.double()
    sums = [len(left), *(float(x.sum()) for x in (returns, returns**2, left, left**2))]
    count, first, second, left_first, left_second = total(sums, ranks, left.device)
    variance = second / count - (first / count) ** 2
    return 1 - (left_second / count - (left_first / count) ** 2) / variance if variance > 0 else math.nan
