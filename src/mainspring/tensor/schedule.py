"""Learning-rate schedules: functions from the number of finished steps to a factor of the peak rate."""

from __future__ import annotations

import math
from collections.abc import Callable

from mainspring.tensor._tensor import ValueOutOfRangeError
from mainspring.tensor.optim import Optimizer

Schedule = Callable[[int], float]


def constant(warmup: int = 0) -> Schedule:
    """A linear rise over `warmup` steps, then 1."""
    return lambda step: _warm(step, warmup)


def linear(total: int, warmup: int = 0, floor: float = 0.0) -> Schedule:
    """A linear rise, then a linear fall to `floor` at step `total`."""
    _check(total, warmup, floor)

    def factor(step: int) -> float:
        return _warm(step, warmup) if step < warmup else 1 - (1 - floor) * _done(step, total, warmup)

    return factor


def cosine(total: int, warmup: int = 0, floor: float = 0.0) -> Schedule:
    """A linear rise, then half a cosine down to `floor` (Loshchilov and Hutter, "SGDR", 2017)."""
    _check(total, warmup, floor)

    def factor(step: int) -> float:
        if step < warmup:
            return _warm(step, warmup)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * _done(step, total, warmup)))

    return factor


def warmup_stable_decay(total: int, warmup: int, decay: int, floor: float = 0.0) -> Schedule:
    """A linear rise, a plateau, and a linear fall over the last `decay` steps (Hu et al., "MiniCPM", 2024)."""
    _check(total, warmup + decay, floor)
    start = total - decay

    def factor(step: int) -> float:
        if step < start or decay == 0:
            return _warm(step, warmup)
        return 1 - (1 - floor) * _done(step, total, start)

    return factor


class Scheduler:
    """Sets an optimizer's rate to its rate at construction times the schedule: call step() after each of its steps."""

    def __init__(self, optimizer: Optimizer, schedule: Schedule) -> None:
        self.optimizer, self.schedule, self.peak = optimizer, schedule, optimizer.lr
        self.num_steps = 0
        optimizer.lr = self.peak * schedule(0)

    def step(self) -> None:
        self.num_steps += 1
        self.optimizer.lr = self.peak * self.schedule(self.num_steps)

    def state_dict(self) -> dict[str, float]:
        return {"num_steps": self.num_steps, "peak": self.peak}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.num_steps, self.peak = int(state["num_steps"]), state["peak"]
        self.optimizer.lr = self.peak * self.schedule(self.num_steps)


def _warm(step: int, warmup: int) -> float:
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def _done(step: int, total: int, start: int) -> float:
    return min(1.0, (step - start) / max(1, total - start))


def _check(total: int, least: int, floor: float) -> None:
    if total < least or not 0 <= floor <= 1:
        raise ValueOutOfRangeError(
            f"a schedule of {total} steps cannot hold {least} of rise and fall, or its floor {floor} is not in [0, 1]"
        )
