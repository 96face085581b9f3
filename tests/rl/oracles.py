"""The formulas of post-training as plain Python loops over plain numbers: what the packed functions are held to."""

from __future__ import annotations

import math
from collections.abc import Sequence


def advantages(
    rewards: Sequence[float],
    values: Sequence[float],
    written: Sequence[bool],
    gamma: float,
    lam: float,
    bootstrap: float,
) -> list[float]:
    """Of one sequence, by the definition: the double sum over the written tokens, no recursion."""
    actions = [t for t, wrote in enumerate(written) if wrote]
    earned = dict.fromkeys(actions, 0.0)
    for t, reward in enumerate(rewards):
        before = [a for a in actions if a <= t]
        if before:
            earned[before[-1]] += reward
    ahead = [values[t] for t in actions[1:]] + [bootstrap]
    deltas = [earned[t] + gamma * after - values[t] for t, after in zip(actions, ahead, strict=False)]
    result = [0.0] * len(rewards)
    for i, t in enumerate(actions):
        result[t] = sum((gamma * lam) ** (j - i) * deltas[j] for j in range(i, len(actions)))
    return result


def group(rewards: Sequence[float], divide_by_std: bool, eps: float) -> list[float]:
    mean = sum(rewards) / len(rewards)
    if len(rewards) == 1:
        return [0.0]
    deviation = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
    return [(r - mean) / (deviation + eps if divide_by_std else 1.0) for r in rewards]


def policy_loss(
    log_ratio: float, advantage: float, low: float, high: float, dual: float | None
) -> tuple[float, float]:
    """(loss, its derivative by log_ratio)."""
    ratio = math.exp(log_ratio)
    if dual is not None and advantage < 0 and ratio * advantage < dual * advantage:
        return -dual * advantage, 0.0
    if advantage > 0 and ratio > 1 + high:
        return -(1 + high) * advantage, 0.0
    if advantage < 0 and ratio < 1 - low:
        return -(1 - low) * advantage, 0.0
    return -ratio * advantage, -ratio * advantage


def value_loss(value: float, old: float, target: float, clip: float) -> float:
    near = min(max(value, old - clip), old + clip)
    return 0.5 * max((value - target) ** 2, (near - target) ** 2)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))
