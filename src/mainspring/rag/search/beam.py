"""Beam search over whole strategies by what the screening knows: it asks no question, so that the beam may be wide."""

from __future__ import annotations

from mainspring.rag.search.screening import Order, Screen
from mainspring.rag.search.space import Space, canonical
from mainspring.rag.strategy import Strategy

_WIDTH = 64
_ROUNDS = 2  # so that a setting that was decided early is looked at again beside the later ones


def beam_search(known: Screen, space: Space, base: Strategy, count: int) -> list[Strategy]:
    """The `count` best of those that it met, the best first; the base is always one of them.

    From the base on, each setting in turn takes all its values in each of the best strategies so far.
    """
    first = canonical(base)
    orders: dict[Strategy, Order] = known.orders([first])
    beam = [first]
    for _ in range(_ROUNDS):
        for choice in space.choices:
            pool = dict.fromkeys(beam)
            pool.update(dict.fromkeys(choice.applied(s, value) for s in beam for value in choice.values))
            orders.update(known.orders([s for s in pool if s not in orders]))
            beam = sorted(pool, key=orders.__getitem__)[:_WIDTH]
    best = sorted(orders, key=orders.__getitem__)[:count]
    return best if first in best else [*best[: count - 1], first]
