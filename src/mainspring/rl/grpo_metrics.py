"""What a step of GRPO and its relatives reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mainspring.rl.dynamic_sampling import Drawn
from mainspring.rl.lockstep import LockstepCheck
from mainspring.rl.math import kl
from mainspring.rl.trajectories import Group, Packed


@dataclass(frozen=True)
class GrpoMetrics:
    """Of one step. What the optimizer's steps see is averaged over them. Over ranks, what comes of the update (loss,
    entropy, clip_fraction, kl_old, grad_norm) is of all answers, the rest of the rank's own."""

    step: int
    reward: float
    """Mean over the answers, without penalties, groups that taught nothing included."""
    teaching: float
    """Share of groups in which rewards differed; only those teach."""
    length: float
    """Written tokens of an answer."""
    finished: float
    """Share of answers that ended by themselves."""
    tokens: int
    """Written in the answers that the step learnt from."""
    loss: float
    entropy: float
    """Nats a token."""
    clip_fraction: float
    kl_old: float
    """k3 from the policy that wrote to the one that is trained."""
    kl_reference: float
    """k3 from the policy that wrote to the reference; nan without one."""
    grad_norm: float
    """Before clipping."""
    max_delta: float
    """The largest |trainer's − engine's| log-probability of those compared, in nats."""
    compared: int
    """Tokens whose log-probabilities were."""
    lag: float
    """Steps that the weights have moved since a token was written, mean over the tokens."""
    dropped: int
    """Answers without a reward."""
    rollout_seconds: float
    reward_seconds: float
    update_seconds: float
    groups: Sequence[Group] = field(repr=False)
    """What was learnt from."""
    advantages: Sequence[float] = field(repr=False)
    """Of each answer, in the groups' order."""


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
