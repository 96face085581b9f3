"""What a step of GRPO and its relatives reports."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mainspring.rl.dynamic_sampling import Drawn
from mainspring.rl.lockstep import LockstepCheck
from mainspring.rl.math import kl
from mainspring.rl.policy_metrics import PolicyMetrics
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
    anchors: list[Tensor] | None,
    totals: dict[str, float],
    check: LockstepCheck,
    update_seconds: float,
) -> GrpoMetrics:
    """step: those done before it. totals: of `policy_update.add_sums` over the step's mini-batches."""
    return GrpoMetrics(
        step=step + 1,
        reward=drawn.reward,
        teaching=drawn.teaching,
        length=float(batch.lengths.double().mean()),
        finished=float(batch.finished.double().mean()),
        tokens=batch.num_tokens,
        loss=totals["loss"] / totals["mini_batches"],
        entropy=totals["entropy"] / totals["tokens"],
        clip_fraction=totals["clipped"] / totals["tokens"],
        kl_old=totals["kl_old"] / totals["tokens"],
        kl_reference=math.nan
        if anchors is None
        else float(kl.k3(batch.old_log_probs, torch.cat(anchors)).mean()),
        grad_norm=totals["grad_norm"] / totals["mini_batches"],
        max_delta=max(check.max_delta, drawn.max_delta),
        compared=check.num_compared + drawn.compared,
        lag=step - float(batch.versions.double().mean()),
        dropped=drawn.dropped,
        rollout_seconds=drawn.seconds,
        reward_seconds=drawn.reward_seconds,
        update_seconds=update_seconds,
        groups=drawn.groups,
        advantages=advantages.tolist(),
    )
