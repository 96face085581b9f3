"""Beam search: several whole strategies are kept while the steps are decided one after the other."""

from __future__ import annotations

from mainspring.rag.search.ledger import Ledger
from mainspring.rag.search.space import Space, canonical
from mainspring.rag.strategy import Strategy

LEAST_QUESTIONS = 20


def beam_search(ledger: Ledger, space: Space, base: Strategy, width: int, budget: int) -> list[Strategy]:
    """Every strategy that was tried on as many questions as the others, the best first.

    From the base on, each setting in turn takes all its values in each of the `width` best strategies so far. As many
    questions are asked as about `budget` evaluations allow, and at least one; where these would be fewer than
    LEAST_QUESTIONS, fewer strategies are kept: a wide beam that cannot tell its strategies apart is worse than greedy.
    """
    values = sum(len(choice.values) for choice in space.choices)
    while width > 1 and budget // (1 + width * values) < LEAST_QUESTIONS:
        width -= 1
    tries = 1 + width * values
    count = max(1, min(ledger.all_questions, budget // tries))
    first = canonical(base)
    if not ledger.extend(first, count):
        return []
    beam, tried = [first], {first}
    for choice in space.choices:
        pool = dict.fromkeys(beam)
        pool.update(dict.fromkeys(choice.applied(s, value) for s in beam for value in choice.values))
        pool = {s: None for s in pool if ledger.extend(s, count)}
        tried.update(pool)
        beam = ledger.ranked(pool, count)[:width]
    return ledger.ranked(tried, count)
