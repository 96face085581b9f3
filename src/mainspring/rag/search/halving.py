"""Successive halving (Karnin, Koren and Somekh, 2013): more questions for ever fewer strategies."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mainspring.rag.search.ledger import Ledger
from mainspring.rag.strategy import Strategy


def successive_halving(ledger: Ledger, pool: Sequence[Strategy]) -> list[Strategy]:
    """Those that are left, the best first. Each round spends an equal share of what the ledger has left."""
    survivors = list(pool)
    while len(survivors) > 1 and ledger.left:
        rounds = math.ceil(math.log2(len(survivors)))
        count = _affordable(ledger, survivors, ledger.left // rounds)
        if count <= min(map(ledger.seen, survivors)):
            break
        for strategy in survivors:
            ledger.extend(strategy, count)
        survivors = ledger.ranked(survivors, count)[: math.ceil(len(survivors) / 2)]
    return survivors


def _affordable(ledger: Ledger, strategies: Sequence[Strategy], budget: int) -> int:
    """The most questions that all of the strategies can have seen for `budget` more evaluations."""
    count = ledger.all_questions
    while count and sum(max(0, count - ledger.seen(s)) for s in strategies) > budget:
        count -= 1
    return count
