"""What a step of every algorithm that learns from rollouts reports."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from mainspring.parallel import mesh
from mainspring.rl.lockstep import LockstepCheck
from mainspring.rl.math import kl
from mainspring.rl.policy_update import most, total
from mainspring.rl.trajectories import Group, Packed


@dataclass(frozen=True, kw_only=True)
class PolicyMetrics:
    """Of one step. What the optimizer's steps see is averaged over them. Over ranks numbers are of all ranks' answers,
    seconds the slowest's; `groups` and `advantages` are the rank's own."""

    step: int
    reward: float
    """Mean over the answers, without penalties."""
    length: float
    """Written tokens of an answer."""
    finished: float
    """Share of answers that ended by themselves."""
    tokens: int
    """Written in the answers that the step learnt from."""
    loss: float
    """The policy's."""
    entropy: float
    """Nats a token."""
    clip_fraction: float
    kl_old: float
    """k3 from the policy that wrote to the one that is trained: how far a step has gone."""
    kl_reference: float
    """k3 from the policy that wrote to the reference; nan without one."""
    grad_norm: float
    """The policy's, before clipping."""
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
    """Of each answer, the mean of its tokens', in the groups' order."""


class Report(Protocol):
    """What rollouts say of a step: `rollouts.RolloutReport`, `dynamic_sampling.Drawn`."""

    @property
    def seconds(self) -> float: ...
    @property
    def reward_seconds(self) -> float: ...
    @property
    def dropped(self) -> int: ...
    @property
    def max_delta(self) -> float: ...
    @property
    def compared(self) -> int: ...


def over_ranks(
    batch: Packed,
    reference_log_probs: Tensor | None,
    check: LockstepCheck,
    report: Report,
    update_seconds: float,
    own: Mapping[str, float],
    ranks: mesh.Group,
) -> dict[str, float]:
    """What `PolicyMetrics` are made of, over all ranks, which call this together.

    batch: the rank's answers of the step. own: sums of the algorithm's own.

    Returns:
        Sums "answers", "finished", "tokens", "versions", "kl_reference" (nan without a reference), "compared",
        "dropped" and `own`'s; the largest "max_delta", "rollout_seconds", "reward_seconds" and "update_seconds".
    """
    distance = math.nan
    if reference_log_probs is not None:
        distance = float(kl.k3(batch.old_log_probs, reference_log_probs).sum())
    sums = {
        "answers": len(batch.samples),
        "finished": float(batch.finished.sum()),
        "tokens": batch.num_tokens,
        "versions": float(batch.versions.double().sum()),
        "kl_reference": distance,
        "compared": check.num_compared + report.compared,
        "dropped": report.dropped,
        **own,
    }
    largest = {
        "max_delta": max(check.max_delta, report.max_delta),
        "rollout_seconds": report.seconds,
        "reward_seconds": report.reward_seconds,
        "update_seconds": update_seconds,
    }
    device = batch.old_log_probs.device
    summed = zip(sums, total(list(sums.values()), ranks, device), strict=True)
    return {**dict(summed), **dict(zip(largest, most(list(largest.values()), ranks, device), strict=True))}
