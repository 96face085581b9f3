"""A step's groups: as they come, or (dynamic sampling) until enough of them teach something."""

from __future__ import annotations

from dataclasses import dataclass

from mainspring.errors import MainspringError
from mainspring.rl.rollouts import RolloutReport, Rollouts
from mainspring.rl.trajectories import Group


@dataclass(frozen=True)
class Drawn:
    """A step's groups, and what came beside them."""

    groups: list[Group]
    reward: float
    """Mean over all answers that were drawn, learnt from or not; of so many:"""
    answers: int
    teaching: float
    """Share of the groups drawn whose rewards are not all equal; of so many:"""
    asked: int
    dropped: int
    """Answers without a reward."""
    seconds: float
    reward_seconds: float
    max_delta: float
    """The rollouts' own, where they run ahead; of so many tokens:"""
    compared: int


def draw(rollouts: Rollouts, step: int, *, max_rounds: int | None) -> Drawn:
    """prompts_per_step groups. With max_rounds, only such whose rewards differ, asking up to so many times.

    Equal rewards give no advantage (Yu et al., arXiv 2503.14476, section 3.2). If rounds run out, that is all.
    Raises MainspringError if that is nothing, and what `Rollouts.collect` raises.
    """
    found: list[Group] = []
    rewards: list[float] = []
    reports: list[RolloutReport] = []
    drawn, taught = 0, 0
    wanted = rollouts.settings.prompts_per_step
    for _ in range(1 if max_rounds is None else max_rounds):
        groups = rollouts.collect()
        teaching = [group for group in groups if len({answer.reward for answer in group}) > 1]
        found += groups if max_rounds is None else teaching
        rewards += [answer.reward for group in groups for answer in group]
        drawn, taught = drawn + len(groups), taught + len(teaching)
        reports.append(rollouts.report)
        if len(found) >= wanted:
            break
    mean = sum(rewards) / len(rewards)
    if not found:
        raise MainspringError(
            f"step {step + 1}: in all {drawn} groups of {max_rounds} rounds the rewards of a group are equal (their "
            f"mean is {mean:.3g}), so there is nothing to learn; give prompts that the model solves sometimes, or "
            "raise group_size or max_rounds"
        )
    return Drawn(
        groups=found[:wanted],
        reward=mean,
        answers=len(rewards),
        teaching=taught / drawn,
        asked=drawn,
        dropped=sum(report.dropped for report in reports),
        seconds=sum(report.seconds for report in reports),
        reward_seconds=sum(report.reward_seconds for report in reports),
        max_delta=max(report.max_delta for report in reports),
        compared=sum(report.compared for report in reports),
    )
