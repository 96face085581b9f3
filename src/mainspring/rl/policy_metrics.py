"""What a step of every algorithm that learns from rollouts reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mainspring.rl.trajectories import Group


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
