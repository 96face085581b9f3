"""The whole search: screening, beam, halving; greedy at equal evaluations; a front; a verdict on held-out questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from mainspring.errors import ConfigError
from mainspring.rag.search.beam import beam_search
from mainspring.rag.search.greedy import greedy_search
from mainspring.rag.search.halving import successive_halving
from mainspring.rag.search.ledger import Evaluate, Figures, Ledger, Outcome, Progress
from mainspring.rag.search.pareto import pareto_front
from mainspring.rag.search.questions import TuneQuestion, split
from mainspring.rag.search.remainder import spend_rest
from mainspring.rag.search.screening import screen
from mainspring.rag.search.space import Space, canonical
from mainspring.rag.search.verdict import Comparison, HeldOut, Recommendation, compare, recommend
from mainspring.rag.strategy import Strategy


@dataclass(frozen=True)
class TuneSettings:
    """`limit`: seconds that the p95 may take. `budget`: evaluations of each search (a strategy on a question).

    `finalists`: strategies that the beam hands to successive halving.
    """

    limit: float
    budget: int = 2000
    finalists: int = 16
    held_out: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.limit > 0 or self.finalists < 1 or not 0 < self.held_out < 1:
            raise ConfigError(
                f"tuning needs a latency above 0, at least 1 finalist and a held-out share between 0 and 1, got "
                f"{self.limit} s, {self.finalists} and {self.held_out}"
            )


@dataclass(frozen=True)
class SearchRun:
    """What one search found, on the questions it searched on."""

    strategy: Strategy
    figures: Figures
    spent: int
    progress: tuple[Progress, ...]


@dataclass(frozen=True)
class TuneResult:
    """All the evidence. `tried` and `front` hold figures on as many searched questions as beam's winner has seen."""

    settings: TuneSettings
    space: Space
    present: Strategy
    searched_questions: int
    beam: SearchRun
    greedy: SearchRun
    tried: dict[Strategy, Figures]
    front: dict[Strategy, Figures]
    held: dict[str, HeldOut]
    comparisons: tuple[Comparison, ...]
    recommendation: Recommendation

    @property
    def recommended(self) -> Strategy:
        """The strategy to use."""
        return self.held[self.recommendation.name].strategy


Heard = Callable[[str, int, int], None]  # hears what is being done, how much of it, of how much


def tune(
    evaluate: Evaluate,
    questions: Sequence[TuneQuestion],
    space: Space,
    present: Strategy,
    settings: TuneSettings,
    heard: Heard = lambda what, done, total: None,
) -> TuneResult:
    """Searches on one part of the questions, compares on the other. Same seed and outcomes, same result.

    Raises DocumentError for too few questions, ConfigError if no strategy that was tried keeps the latency.
    """
    searching, held_out = split(questions, settings.held_out, settings.seed)
    ledger, second = search(evaluate, searching, space, present, settings, heard)
    beam, greedy = _run(ledger), _run(second)
    candidates = {"present": canonical(present), "beam": beam.strategy, "greedy": greedy.strategy}
    judged = _heard(evaluate, heard, "Held out", len(candidates) * len(held_out))
    held = {
        name: HeldOut(strategy, tuple(judged(strategy, question) for question in held_out))
        for name, strategy in candidates.items()
    }
    comparisons = compare(held)
    count = beam.figures.questions
    tried = {s: ledger.figures(s, count) for s in ledger.strategies if ledger.seen(s) >= count}
    return TuneResult(
        settings,
        space,
        canonical(present),
        len(searching),
        beam,
        greedy,
        tried,
        pareto_front(tried),
        held,
        comparisons,
        recommend(held, comparisons, settings.limit),
    )


def search(
    evaluate: Evaluate,
    questions: Sequence[TuneQuestion],
    space: Space,
    present: Strategy,
    settings: TuneSettings,
    heard: Heard = lambda what, done, total: None,
) -> tuple[Ledger, Ledger]:
    """What beam with halving has evaluated, and greedy with as many evaluations; each ledger's leader is its find.

    Raises ConfigError if no strategy that was tried keeps the latency.
    """
    ledger = Ledger(
        _heard(evaluate, heard, "Beam", settings.budget), questions, settings.budget, settings.limit
    )
    _beam_then_halving(ledger, space, present, settings)
    fastest = ledger.figures(ledger.leader()).p95
    if fastest > settings.limit:
        raise ConfigError(
            f"no strategy that was tried on all questions keeps a p95 of {settings.limit * 1000:.0f} ms; the fastest "
            f"takes {fastest * 1000:.0f} ms: allow more, or a larger --budget"
        )
    # Greedy gets what beam has spent: less than the budget if the space was evaluated whole.
    second = Ledger(_heard(evaluate, heard, "Greedy", ledger.spent), questions, ledger.spent, settings.limit)
    spend_rest(second, space, present, greedy_search(second, space, present), Random(settings.seed + 1))
    return ledger, second


def _beam_then_halving(ledger: Ledger, space: Space, present: Strategy, settings: TuneSettings) -> None:
    """A part of the budget screens the space, the rest tells the best of what a beam found there apart."""
    generator = Random(settings.seed)
    known = screen(ledger, space, present, generator)
    found = beam_search(known, space, present, settings.finalists)
    best = successive_halving(ledger, found)
    spend_rest(ledger, space, present, [*best, *found], generator)


def _run(ledger: Ledger) -> SearchRun:
    leader = ledger.leader()
    return SearchRun(leader, ledger.figures(leader), ledger.spent, tuple(ledger.progress))


def _heard(evaluate: Evaluate, heard: Heard, what: str, total: int) -> Evaluate:
    done = 0

    def counted(strategy: Strategy, question: TuneQuestion) -> Outcome:
        nonlocal done
        outcome = evaluate(strategy, question)
        done += 1
        heard(what, done, total)
        return outcome

    return counted
