"""Environments in a process of their own, each call within a limit of seconds: one that hangs costs its conversation.

    with EnvironmentWorker(Calculator, timeout=10.0) as environment:
        rollouts = Rollouts(model, prompts, texts, scorer, settings, environment=environment)

All conversations' environments live in the one process. When it must be ended, or dies, the others are told again what
they had been told, in the next process: an environment is a function of that (`environment.Environment`).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

from mainspring.rl.closes import Closes
from mainspring.rl.environment import Environment, Turn
from mainspring.rl.prompts import Prompt
from mainspring.rl.worker import Worker


class EnvironmentWorker(Closes):
    """Makes environments, as `Rollouts` takes them. Close it, or use it as a context manager; not thread-safe.

    Their `reset` and `step` raise CallFailedError where the environment raised, did not answer or died, or its turn's
    reward is no finite number; ConfigError for what cannot be imported in the process.
    """

    def __init__(self, make: Callable[[], Environment], *, timeout: float = 10.0) -> None:
        """make: a class or function of a module's top level. timeout: seconds for one `reset` or `step`."""
        name = f"the environment {getattr(make, '__name__', make)}"
        self._worker = Worker(partial(_Environments, make), name=name, timeout=timeout)
        self._numbers = count()
        self._gone: list[int] = []

    def __call__(self) -> Environment:
        number = next(self._numbers)
        environment = _Elsewhere(self._worker, number, self._gone)
        weakref.finalize(environment, self._gone.append, number)
        return environment

    def close(self) -> None:
        """Ends the process at once."""
        self._worker.close()


class _Elsewhere:
    """One of them, as the run sees it."""

    def __init__(self, worker: Worker, number: int, gone: list[int]) -> None:
        self._worker, self._number, self._gone = worker, number, gone
        self._prompt = Prompt((), "", "")
        self._told: list[str] = []
        self._home = -1  # the process that has it

    def reset(self, prompt: Prompt) -> None:
        self._prompt, self._told = prompt, []
        self._begin()

    def step(self, answer: str) -> Turn:
        self._worker.start()
        if self._home != self._worker.starts:
            self._begin()
            for told in self._told:
                self._ask("step", told)
        turn: Turn = self._ask("step", answer)
        self._told.append(answer)
        return turn

    def _begin(self) -> None:
        self._ask("reset", self._prompt)
        self._home = self._worker.starts

    def _ask(self, what: str, told: Prompt | str) -> Any:
        gone = [self._gone.pop() for _ in range(len(self._gone))]
        return self._worker.call(self._number, what, told, gone)


class _Environments:
    """What answers in the process."""

    def __init__(self, make: Callable[[], Environment]) -> None:
        self._make = make
        self._of: dict[int, Environment] = {}

    def __call__(self, number: int, what: str, told: Any, gone: list[int]) -> Turn | None:
        for one in gone:
            self._of.pop(one, None)
        if what == "reset":
            self._of[number] = self._make()
            self._of[number].reset(told)
            return None
        turn = self._of[number].step(told)
        if not isinstance(turn, Turn) or not math.isfinite(turn.reward):
            raise TypeError(f"a step must give a Turn with a finite reward, not {turn!r}")
        return turn
