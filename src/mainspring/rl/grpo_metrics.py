"""What a step of GRPO and its relatives reports."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from mainspring.parallel.mesh import Group
from mainspring.rl.dynamic_sampling import Drawn
from mainspring.rl.lockstep import LockstepCheck
from mainspring.rl.math import kl
from mainspring.rl.policy_metrics import PolicyMetrics
from mainspring.rl.policy_update import most, total
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
    moved = 0.0 if anchors is None else float(kl.k3(batch.old_log_probs, anchors).sum())
    sums = {
        "reward": drawn.reward * drawn.answers,
        "drawn": drawn.answers,
        "teaching": drawn.teaching * drawn.asked,
        "asked": drawn.asked,
        "answers": len(batch.samples),
        "tokens": batch.num_tokens,
        "finished": float(batch.finished.sum()),
        "versions": float(batch.versions.double().sum()),
        "kl_reference": moved,
        "compared": check.num_compared + drawn.compared,
        "dropped": drawn.dropped,
    }
    device = batch.old_log_probs.device
    of = dict(zip(sums, total(list(sums.values()), group, device), strict=True))
    waited = [max(check.max_delta, drawn.max_delta), drawn.seconds, drawn.reward_seconds, update_seconds]
    max_delta, rollout_seconds, reward_seconds, update_seconds = most(waited, group, device)
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
        kl_reference=math.nan if anchors is None else of["kl_reference"] / of["tokens"],
        grad_norm=totals["grad_norm"] / totals["mini_batches"],
        max_delta=max_delta,
        compared=int(of["compared"]),
        lag=step - of["versions"] / of["tokens"],
        dropped=int(of["dropped"]),
        rollout_seconds=rollout_seconds,
        reward_seconds=reward_seconds,
        update_seconds=update_seconds,
        groups=drawn.groups,
        advantages=advantages.tolist(),
    )
