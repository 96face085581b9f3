"""The baseline: module by module, each setting at its best before the next is looked at, as AutoRAG does."""

from __future__ import annotations

from mainspring.rag.search.ledger import Ledger
from mainspring.rag.search.space import Space, canonical
from mainspring.rag.strategy import Strategy


def greedy_search(ledger: Ledger, space: Space, base: Strategy) -> list[Strategy]:
    """The strategy that the last module leaves, then the others that were tried, the best first.

    Trials share the whole budget: as many questions for each.
    """
    trials = 1 + sum(len(choice.values) for choice in space.choices)
    count = max(1, min(ledger.all_questions, ledger.budget // trials))
    best = canonical(base)
    if not ledger.extend(best, count):
        return []
    tried = {best}
    for choice in space.choices:
        pool = dict.fromkeys([best, *(choice.applied(best, value) for value in choice.values)])
        done = [s for s in pool if ledger.extend(s, count)]
        tried.update(done)
        best = ledger.ranked(done, count)[0]
    return [best, *ledger.ranked(tried - {best}, count)]
