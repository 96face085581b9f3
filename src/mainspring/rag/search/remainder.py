"""The rest of a budget, spent the same way by every search, so that two searches compare at equal evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from mainspring.rag.search.ledger import Ledger
from mainspring.rag.search.space import Space
from mainspring.rag.strategy import Strategy


def spend_rest(
    ledger: Ledger, space: Space, base: Strategy, best: Sequence[Strategy], generator: Random
) -> None:
    """All questions for the best strategies, then for strategies drawn at random, until nothing is left to spend.

    Evaluations are left over only if the space (or 100,000 draws of it) has been evaluated on every question.
    """
    for strategy in best:
        ledger.extend(strategy, ledger.all_questions)
    if ledger.left:
        for strategy in space.shuffled(base, generator):
            ledger.extend(strategy, ledger.all_questions)
            if not ledger.left:
                return
