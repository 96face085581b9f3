"""What a search has evaluated and what it may still spend: one unit is one strategy on one question.

Strategies are compared on the first questions of one order, as many as both have seen; a look at a question further on
counts for them as soon as the gap is closed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mainspring.errors import ConfigError
from mainspring.rag.search.questions import TuneQuestion
from mainspring.rag.strategy import Strategy


@dataclass(frozen=True)
class Outcome:
    """One strategy on one question: quality in [0, 1], seconds, and characters that models read."""

    quality: float
    seconds: float
    cost: float


Evaluate = Callable[[Strategy, TuneQuestion], Outcome]


@dataclass(frozen=True)
class Figures:
    """A strategy on `questions` of them: mean quality, p95 of the seconds, mean cost."""

    quality: float
    p95: float
    cost: float
    questions: int

    @staticmethod
    def of(outcomes: Sequence[Outcome]) -> Figures:
        """The figures of at least one outcome."""
        return Figures(
            float(np.mean([outcome.quality for outcome in outcomes])),
            float(np.quantile([outcome.seconds for outcome in outcomes], 0.95)),
            float(np.mean([outcome.cost for outcome in outcomes])),
            len(outcomes),
        )

    def order(self, limit: float) -> tuple[bool, float, float, float]:
        """Sorts the best first: within the limit of seconds by quality, cost and time, beyond it by time."""
        if self.p95 <= limit:
            return False, -self.quality, self.cost, self.p95
        return True, self.p95, -self.quality, self.cost


@dataclass(frozen=True)
class Progress:
    """After so many evaluations the leading strategy had this mean quality (on the questions it had seen)."""

    spent: int
    quality: float


class Ledger:
    """Evaluates within a budget, each pair of strategy and question once."""

    def __init__(
        self, evaluate: Evaluate, questions: Sequence[TuneQuestion], budget: int, limit: float
    ) -> None:
        """`limit`: seconds that the p95 of a strategy may take. Raises ConfigError for a budget below 1."""
        if budget < 1:
            raise ConfigError(f"a search needs a budget of at least 1 evaluation, got {budget}")
        self._evaluate = evaluate
        self._questions = tuple(questions)
        self._outcomes: dict[Strategy, dict[int, Outcome]] = {}
        self._seen: dict[Strategy, int] = {}
        self._leader: Strategy | None = None
        self.budget = budget
        self.limit = limit
        self.spent = 0
        self.progress: list[Progress] = []

    @property
    def left(self) -> int:
        """Evaluations that may still be spent."""
        return self.budget - self.spent

    @property
    def all_questions(self) -> int:
        """How many questions there are."""
        return len(self._questions)

    @property
    def strategies(self) -> Collection[Strategy]:
        """Those that have seen a question."""
        return self._outcomes.keys()

    def outcomes(self, strategy: Strategy) -> Iterable[tuple[int, Outcome]]:
        """The numbers of the questions that a strategy has seen, and how it did."""
        return self._outcomes.get(strategy, {}).items()

    def seen(self, strategy: Strategy) -> int:
        """How many questions a strategy has seen, from the first on without a gap."""
        return self._seen.get(strategy, 0)

    def look(self, strategy: Strategy, number: int) -> bool:
        """Lets a strategy see one question, if something is left to spend; whether it has."""
        outcomes = self._outcomes.get(strategy, {})
        if number in outcomes:
            return True
        if self.left == 0:
            return False
        self.spent += 1
        outcomes[number] = self._evaluate(strategy, self._questions[number])
        self._outcomes[strategy] = outcomes
        while self.seen(strategy) in outcomes:
            self._seen[strategy] = self.seen(strategy) + 1
            self._consider(strategy)
        return True

    def extend(self, strategy: Strategy, count: int) -> bool:
        """Lets a strategy see the first `count` questions, as far as the budget goes; whether it has."""
        wanted = min(count, self.all_questions)
        while self.seen(strategy) < wanted and self.look(strategy, self.seen(strategy)):
            pass
        if self._leader is not None:
            self.progress.append(Progress(self.spent, self.figures(self._leader).quality))
        return self.seen(strategy) >= wanted

    def figures(self, strategy: Strategy, count: int | None = None) -> Figures:
        """On the first `count` questions, or on all that the strategy has seen without a gap."""
        last = min(self.seen(strategy), count if count is not None else self.all_questions)
        return Figures.of([self._outcomes[strategy][number] for number in range(last)])

    def ranked(self, strategies: Collection[Strategy], count: int | None = None) -> list[Strategy]:
        """The best first, on the first `count` questions, or each on what it has seen."""
        return sorted(strategies, key=lambda s: self.figures(s, count).order(self.limit))

    def leader(self) -> Strategy:
        """The best of those that have seen most questions. Raises ConfigError before the first evaluation."""
        if self._leader is None:
            raise ConfigError("nothing was evaluated, so nothing leads")
        return self._leader

    def _consider(self, strategy: Strategy) -> None:
        """A strategy that has seen more leads, or as much and did better."""
        lead = self.seen(self._leader) if self._leader is not None else 0
        if self._leader is None or self.seen(strategy) > lead:
            self._leader = strategy
        elif self.seen(strategy) == lead:
            self._leader = self.ranked([self._leader, strategy])[0]
