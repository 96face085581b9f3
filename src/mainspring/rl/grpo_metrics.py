"""What a step of GRPO and its relatives reports."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mainspring.parallel.mesh import Group
from mainspring.rl.dynamic_sampling import Drawn
from mainspring.rl.lockstep import LockstepCheck
from mainspring.rl.policy_metrics import PolicyMetrics, over_ranks
from mainspring.rl.trajectories import Packed


@dataclass(frozen=True, kw_only=True)
class GrpoMetrics(PolicyMetrics):
    """The reward is that of all answers, groups that taught nothing included."""

    teaching: float
    """Share of groups in which rewards differed; only those teach."""


def grpo_metrics(
    step: int,
    drawn: Drawn,
    batch: Packed,
    advantages: Tensor,
    anchors: Tensor | None,
    totals: dict[str, float],
    check: LockstepCheck,
    update_seconds: float,
    group: Group,
) -> GrpoMetrics:
    """step: those done before it. totals: of `policy_update.add_sums` over the step's mini-batches. group: the ranks,
    all of which call this together."""
    own = {
        "reward": drawn.reward * drawn.answers,
        "drawn": drawn.answers,
        "teaching": drawn.teaching * drawn.asked,
        "asked": drawn.asked,
    }
    of = over_ranks(batch, anchors, check, drawn, update_seconds, own, group)
    return GrpoMetrics(
        step=step + 1,
        reward=of["reward"] / of["drawn"],
        teaching=of["teaching"] / of["asked"],
        length=of["tokens"] / of["answers"],
        finished=of["finished"] / of["answers"],
        tokens=int(of["tokens"]),
        loss=totals["loss"] / totals["mini_batches"],
        entropy=totals["entropy"] / totals["tokens"],
        clip_fraction=totals["clipped"] / totals["tokens"],
        kl_old=totals["kl_old"] / totals["tokens"],
        kl_reference=of["kl_reference"] / of["tokens"],
        grad_norm=totals["grad_norm"] / totals["mini_batches"],
        max_delta=of["max_delta"],
        compared=int(of["compared"]),
        lag=step - of["versions"] / of["tokens"],
        dropped=int(of["dropped"]),
        rollout_seconds=of["rollout_seconds"],
        reward_seconds=of["reward_seconds"],
        update_seconds=of["update_seconds"],
        groups=drawn.groups,
        advantages=advantages.tolist(),
    )
