"""Screening: many whole strategies on a few questions each, and a linear model of what their settings are worth.

Setting after setting from one strategy on stops where no single change helps, and asks every question again for each
value. In a designed experiment (Fisher, 1935) every evaluation says something of all settings at once, and of pairs of
them: strategies are drawn from the whole space, each sees other questions, and quality is fitted as

    quality(strategy, question) = question + settings + pairs of settings + noise

by ridge regression, the questions' own terms unpenalised. Seconds are fitted in the same way, by their logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from random import Random

import numpy as np
import numpy.typing as npt

from mainspring.rag.search.ledger import Ledger
from mainspring.rag.search.space import Space, Value, canonical
from mainspring.rag.strategy import IndexStep, Strategy

_SHARE = 0.4  # of the budget
_MOST = 4000  # evaluations: what more would say does not pay for the fit
_LOOKS = 4  # questions that a strategy sees
_REPEATS = (
    4  # strategies that see a question: with one alone its term would take up all that the strategy did
)
_WAYS = 8  # of cutting and embedding: each drawn one is an index that must be made
# Variance of the noise over that of what a setting, or a pair, is worth: 0.17 against 0.022 and 0.011.
_RIDGE, _PAIR_RIDGE = 60.0, 240.0
_SECONDS_RIDGE = 1.0
_P95 = 1.645  # standard deviations above the mean

Array = npt.NDArray[np.float64]
Order = tuple[bool, float]
_Key = tuple[int | Value, ...]  # (choice, value), or two of them: what a column of the design stands for


@dataclass(frozen=True)
class Screen:
    """The fitted model. `quality` is relative: only differences mean something."""

    space: Space
    columns: dict[_Key, int]
    quality: Array
    log_seconds: Array
    mean_log_seconds: float
    spread: float
    limit: float

    def orders(self, strategies: Collection[Strategy]) -> dict[Strategy, Order]:
        """What sorts the best first: within the limit of seconds by quality, beyond it by time."""
        if not strategies:
            return {}
        design = np.stack([_row(_keys(self.space, s), self.columns) for s in strategies])
        quality = (design @ self.quality).tolist()
        p95 = np.exp(self.mean_log_seconds + design @ self.log_seconds + _P95 * self.spread).tolist()
        return {
            s: (True, time) if time > self.limit else (False, -good)
            for s, good, time in zip(strategies, quality, p95, strict=True)
        }


def screen(ledger: Ledger, space: Space, base: Strategy, generator: Random) -> Screen:
    """Spends a part of the budget on strategies drawn from the space, and fits the model to what they did."""
    budget = min(int(_SHARE * ledger.budget), _MOST, ledger.left)
    looks = min(_LOOKS, ledger.all_questions)
    questions = _cycle(min(ledger.all_questions, max(looks, budget // _REPEATS)), generator)
    for strategy in _drawn(space, canonical(base), budget // looks, generator):
        for _ in range(looks):
            ledger.look(strategy, next(questions))
    return _fitted(ledger, space)


def _drawn(space: Space, base: Strategy, count: int, generator: Random) -> list[Strategy]:
    """The base and others, all different, whose ways of cutting and embedding are few."""
    if count < 1:
        return []
    found = {base: None}
    ways: set[IndexStep] = {base.index}
    for strategy in space.shuffled(base, generator):
        if len(found) >= count:
            break
        if len(ways) < _WAYS:
            ways.add(strategy.index)
        if strategy.index in ways:
            found[strategy] = None
    return list(found)


def _cycle(count: int, generator: Random) -> Iterator[int]:
    """Numbers of questions in random orders, one order after the other: each comes about equally often."""
    while True:
        yield from generator.sample(range(count), count)


def _fitted(ledger: Ledger, space: Space) -> Screen:
    keys = {strategy: _keys(space, strategy) for strategy in ledger.strategies}
    columns: dict[_Key, int] = {}
    for row in keys.values():
        for key in row:
            columns.setdefault(key, len(columns))
    rows = {strategy: _row(row, columns) for strategy, row in keys.items()}
    looks = [(s, number, outcome) for s in keys for number, outcome in ledger.outcomes(s)]
    if not looks:
        nothing = np.zeros(len(columns))
        return Screen(space, columns, nothing, nothing, -math.inf, 0.0, ledger.limit)
    design = np.stack([rows[s] for s, _, _ in looks])
    asked = np.array([number for _, number, _ in looks])
    ridge = np.array([_RIDGE if len(key) == 2 else _PAIR_RIDGE for key in columns])
    values = np.array([outcome.quality for _, _, outcome in looks])
    quality = _solved(_without_means(design, asked), _without_means(values[:, None], asked)[:, 0], ridge)
    logs = np.log([max(outcome.seconds, 1e-6) for _, _, outcome in looks])
    log_seconds = _solved(design, logs - logs.mean(), np.full(len(columns), _SECONDS_RIDGE))
    spread = float(np.std(logs - logs.mean() - design @ log_seconds))
    return Screen(space, columns, quality, log_seconds, float(logs.mean()), spread, ledger.limit)


def _keys(space: Space, strategy: Strategy) -> list[_Key]:
    """Its settings and pairs of them; a setting that has no effect in this strategy has a value of its own."""
    single: list[tuple[int, Value]] = []
    for number, choice in enumerate(space.choices):
        value = choice.value(strategy)
        idle = all(choice.applied(strategy, other) == strategy for other in choice.values if other != value)
        single.append((number, "without effect" if idle else value))
    return [*single, *((*one, *other) for one, other in combinations(single, 2))]


def _row(keys: Sequence[_Key], columns: dict[_Key, int]) -> Array:
    """Ones where its settings and pairs stand; what no screened strategy had counts as average."""
    row = np.zeros(len(columns))
    row[[columns[key] for key in keys if key in columns]] = 1
    return row


def _without_means(values: Array, groups: npt.NDArray[np.int64]) -> Array:
    """[N, F] less each group's mean: as if every question had a term of its own."""
    sums = np.zeros((int(groups.max()) + 1, values.shape[1]))
    np.add.at(sums, groups, values)
    return values - (sums / np.maximum(np.bincount(groups), 1)[:, None])[groups]


def _solved(design: Array, values: Array, ridge: Array) -> Array:
    return np.asarray(
        np.linalg.solve(design.T @ design + np.diag(ridge), design.T @ values), dtype=np.float64
    )
