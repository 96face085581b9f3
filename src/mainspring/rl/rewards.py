"""Reward functions in a process of their own: one that raises, hangs or dies costs a sample, not the run.

with RewardWorker(same_number, timeout=5.0, max_failures=100) as worker:
    rewards = worker.score(completions)       # None: dropped
"""

from __future__ import annotations

import math
import multiprocessing
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Protocol, Self

from mainspring.errors import ConfigError, MainspringError

RewardFunction = Callable[[str, str, str], float]
"""(prompt, answer, reference) -> reward. A function of a module's top level: the worker imports it by name."""

_START_SECONDS = 120.0  # the worker's imports; a function is timed without them


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


class RewardWorker:
    """Calls a reward function in a child process, one completion at a time, each within `timeout` seconds.

    A failure (an exception, a timeout, a dead worker, a result that is no finite number) is counted in `failures`,
    its reason kept in `last_failure`, and the sample's reward is None. Raises ConfigError for limits out of range and,
    at the first score, for a function that has no name to import it by.
    """

    def __init__(self, function: RewardFunction, *, timeout: float = 10.0, max_failures: int = 100) -> None:
        if not timeout > 0:
            raise ConfigError(f"a reward's timeout must be above 0 seconds, got {timeout}")
        if max_failures < 0:
            raise ConfigError(f"max_failures must be at least 0, got {max_failures}")
        self._function = function
        self._timeout = timeout
        self._max_failures = max_failures
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None
        self.failures = 0
        self.last_failure: str | None = None

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        """A reward for each, or None. Raises MainspringError once there are more than max_failures in all."""
        return [self._one(completion) for completion in completions]

    def close(self) -> None:
        """Ends the worker at once."""
        if self._process is not None and self._pipe is not None:
            self._pipe.close()
            self._process.kill()
            self._process.join()
        self._process = self._pipe = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _one(self, completion: Completion) -> float | None:
        pipe = self._pipe or self._start()
        try:
            pipe.send((completion.prompt, completion.answer, completion.reference))
            if not pipe.poll(self._timeout):
                self.close()
                self._count_failure(f"it did not answer within {self._timeout} s")
                return None
            value, problem = pipe.recv()
        except (EOFError, OSError):  # the worker is gone
            self.close()
            self._count_failure("its process died")
            return None
        if problem is not None:
            self._count_failure(problem)
            return None
        return float(value)

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")  # a fork would copy the trainer's threads' locks
        pipe, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(self._function, theirs), daemon=True)
        try:
            process.start()
        except (pickle.PicklingError, AttributeError) as error:
            pipe.close()
            theirs.close()
            raise ConfigError(
                f"the reward function {_name(self._function)} cannot be handed to a worker ({error}); "
                "define it at the top level of a module"
            ) from error
        theirs.close()  # so that the child's end closes with the child
        self._process, self._pipe = process, pipe
        try:
            ready = pipe.poll(_START_SECONDS) and pipe.recv()
        except (EOFError, OSError):
            ready = False
        if not ready:
            self.close()
            raise MainspringError(
                f"the worker of the reward function {_name(self._function)} did not start; "
                "its module must be importable in a fresh process"
            )
        return pipe

    def _count_failure(self, reason: str) -> None:
        self.failures += 1
        self.last_failure = reason
        if self.failures > self._max_failures:
            raise MainspringError(
                f"the reward function {_name(self._function)} has failed {self.failures} times, more than "
                f"max_failures = {self._max_failures}; the last time: {reason}. Mend it, or raise max_failures"
            )


def _serve(function: RewardFunction, pipe: Connection) -> None:
    """The worker's loop; it ends when the other end of the pipe is closed."""
    pipe.send(True)
    while True:
        try:
            prompt, answer, reference = pipe.recv()
        except EOFError:
            return
        try:
            value = float(function(prompt, answer, reference))
            problem = None if math.isfinite(value) else f"it gave {value}"
        except Exception as error:  # whatever a user's function raises is that sample's failure
            value, problem = math.nan, f"{type(error).__name__}: {error}"
        pipe.send((value, problem))


def _name(function: RewardFunction) -> str:
    return str(getattr(function, "__name__", function))
