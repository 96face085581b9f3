"""Reward functions in a process of their own: one that raises, hangs or dies costs a sample, not the run.

with RewardWorker(same_number, timeout=5.0, max_failures=100) as worker:
    rewards = worker.score(completions)       # None: dropped
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from mainspring.errors import ConfigError, MainspringError
from mainspring.rl.closes import Closes
from mainspring.rl.worker import CallFailedError, Handler, Worker

RewardFunction = Callable[[str, str, str], float]
"""(prompt, answer, reference) -> reward. A function of a module's top level: the worker imports it by name."""


@dataclass(frozen=True)
class Completion:
    """An answer to be rewarded, and what is known to be right."""

    prompt: str
    answer: str
    reference: str
    tokens: tuple[int, ...] = ()
    """The whole conversation as the policy read and wrote it, for a reward that a model gives."""


class Scorer(Protocol):
    """What gives rewards: a `RewardWorker`, a reward model."""

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        """A finite reward for each, or None: the sample is dropped."""
        ...


class RewardWorker(Closes):
    """Calls a reward function in a child process, one completion at a time, each within `timeout` seconds.

    A failure (an exception, a timeout, a dead worker, a result that is no finite number) is counted in `failures`,
    its reason kept in `last_failure`, and the sample's reward is None. Raises ConfigError for limits out of range and,
    at the first score, for a function that has no name to import it by.
    """

    def __init__(self, function: RewardFunction, *, timeout: float = 10.0, max_failures: int = 100) -> None:
        if max_failures < 0:
            raise ConfigError(f"max_failures must be at least 0, got {max_failures}")
        self._name = f"the reward function {getattr(function, '__name__', function)}"
        self._worker = Worker(partial(_handler, function), name=self._name, timeout=timeout)
        self._max_failures = max_failures
        self.failures = 0
        self.last_failure: str | None = None

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        """A reward for each, or None. Raises MainspringError once there are more than max_failures in all."""
        return [self._one(completion) for completion in completions]

    def close(self) -> None:
        """Ends the worker at once."""
        self._worker.close()

    def _one(self, completion: Completion) -> float | None:
        try:
            value: float = self._worker.call(completion.prompt, completion.answer, completion.reference)
        except CallFailedError as error:
            self._count_failure(str(error))
            return None
        if not math.isfinite(value):
            self._count_failure(f"it gave {value}")
            return None
        return value

    def _count_failure(self, reason: str) -> None:
        self.failures += 1
        self.last_failure = reason
        if self.failures > self._max_failures:
            raise MainspringError(
                f"{self._name} has failed {self.failures} times, more than max_failures = {self._max_failures}; "
                f"the last time: {reason}. Mend it, or raise max_failures"
            )


def _handler(function: RewardFunction) -> Handler:
    return lambda prompt, answer, reference: float(function(prompt, answer, reference))
