"""What held-out questions say: nothing is called better unless a paired bootstrap's interval lies above zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mainspring.rag.evaluation.bootstrap import Interval, bootstrap, paired_difference
from mainspring.rag.search.ledger import Figures, Outcome
from mainspring.rag.strategy import Strategy

_PAIRS = (("beam", "present"), ("greedy", "present"), ("beam", "greedy"))
CONFIDENCE = 1 - 0.05 / len(_PAIRS)  # Bonferroni: 95% for all the comparisons together


@dataclass(frozen=True)
class HeldOut:
    """A strategy on the held-out questions, one outcome a question."""

    strategy: Strategy
    outcomes: tuple[Outcome, ...]

    @property
    def figures(self) -> Figures:
        """Mean quality, p95, mean cost."""
        return Figures.of(self.outcomes)

    @property
    def quality(self) -> Interval:
        """Mean quality with its 95% interval."""
        return bootstrap(self._qualities())

    def minus(self, other: HeldOut) -> Interval:
        """The paired difference in quality, at CONFIDENCE."""
        return paired_difference(self._qualities(), other._qualities(), confidence=CONFIDENCE)

    def _qualities(self) -> list[float]:
        return [outcome.quality for outcome in self.outcomes]


@dataclass(frozen=True)
class Comparison:
    """The difference in held-out quality between two of "beam", "greedy" and "present"."""

    one: str
    other: str
    difference: Interval

    @property
    def better(self) -> bool:
        """Whether the first is shown to be better."""
        return self.difference.low > 0

    @property
    def worse(self) -> bool:
        """Whether the first is shown to be worse."""
        return self.difference.high < 0

    def __str__(self) -> str:
        word = "better" if self.better else "worse" if self.worse else "not shown to differ"
        return f"{self.one} minus {self.other}: {self.difference} ({word})"


@dataclass(frozen=True)
class Recommendation:
    """The name of a strategy ("beam", "greedy", "present") and why it."""

    name: str
    reason: str


def compare(held: dict[str, HeldOut]) -> tuple[Comparison, ...]:
    """All comparisons between "beam", "greedy" and "present"."""
    return tuple(Comparison(one, other, held[one].minus(held[other])) for one, other in _PAIRS)


def recommend(held: dict[str, HeldOut], comparisons: Sequence[Comparison], limit: float) -> Recommendation:
    """What to use with a p95 of at most `limit` seconds. The present strategy stays unless another one has a reason."""
    by_pair = {(c.one, c.other): c for c in comparisons}
    fits = {name: found.figures.p95 <= limit for name, found in held.items()}
    better = [name for name in ("beam", "greedy") if fits[name] and by_pair[name, "present"].better]
    if better:
        # The searches' own winner comes first; greedy's only if it is shown to be better than that.
        name = "greedy" if "greedy" in better and by_pair["beam", "greedy"].worse else better[0]
        return Recommendation(name, f"better on held-out questions: {by_pair[name, 'present']}")
    if fits["present"]:
        return Recommendation("present", "no other one within the limit is shown to be better")
    taken = f"the present strategy's p95 is {held['present'].figures.p95 * 1000:.0f} ms"
    for name in ("beam", "greedy"):
        if fits[name]:
            return Recommendation(name, f"within the limit, and {taken}; {by_pair[name, 'present']}")
    name = min(held, key=lambda n: held[n].figures.p95)
    return Recommendation(
        name,
        f"none kept the limit on held-out questions; this one is the fastest ({held[name].figures.p95 * 1000:.0f} ms)",
    )
