"""The Pareto front: strategies that no other one beats in quality, p95 latency and cost at once."""

from __future__ import annotations

from collections.abc import Mapping

from mainspring.rag.search.ledger import Figures
from mainspring.rag.strategy import Strategy


def dominates(one: Figures, other: Figures) -> bool:
    """Whether one is nowhere worse and somewhere better."""
    ours, theirs = (-one.quality, one.p95, one.cost), (-other.quality, other.p95, other.cost)
    return ours != theirs and all(a <= b for a, b in zip(ours, theirs, strict=True))


def pareto_front(figures: Mapping[Strategy, Figures]) -> dict[Strategy, Figures]:
    """Those that none dominates, the fastest first."""
    front = {s: f for s, f in figures.items() if not any(dominates(g, f) for g in figures.values())}
    return dict(sorted(front.items(), key=lambda item: item[1].p95))
