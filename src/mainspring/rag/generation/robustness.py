"""How well a generator answers from contexts that help, that help in part, and that do not help at all.

After arXiv 2407.01219, section 3.7: the same held-out questions with the relevant passage (Dg), with the relevant and
a random one (Dgr), and with a random one alone (Dr). What it loses from the first to the second is what irrelevant
passages cost it; in the third it can only know the answer by heart, or be led astray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mainspring.errors import ConfigError
from mainspring.rag.evaluation.bootstrap import Interval, bootstrap, paired_difference
from mainspring.rag.evaluation.measures import exact_match, token_f1
from mainspring.rag.generation.tuning_data import ContextKind, TuningRow

CONTEXTS: Mapping[ContextKind, str] = {"dg": "relevant", "dgr": "relevant and random", "dr": "random"}


@dataclass(frozen=True)
class Scores:
    """One value a question, between 0 and 1; `contained`: the paper's "EM", an accepted answer as a substring."""

    exact: tuple[float, ...]
    contained: tuple[float, ...]
    f1: tuple[float, ...]

    def intervals(self) -> tuple[Interval, Interval, Interval]:
        """(exact match, containment, F1) with 95% bootstrap intervals."""
        return bootstrap(self.exact), bootstrap(self.contained), bootstrap(self.f1)


def score(answers: Sequence[str], rows: Sequence[TuningRow]) -> Scores:
    """Answers against what is accepted, row by row. Raises ConfigError if their numbers differ."""
    if len(answers) != len(rows):
        raise ConfigError(f"there are {len(answers)} answers to {len(rows)} questions")
    pairs = [(answer, row.answers) for answer, row in zip(answers, rows, strict=True)]
    return Scores(
        tuple(exact_match(answer, accepted) for answer, accepted in pairs),
        tuple(exact_match(answer, accepted, paper_compat=True) for answer, accepted in pairs),
        tuple(token_f1(answer, accepted) for answer, accepted in pairs),
    )


def table(scores: Mapping[str, Mapping[ContextKind, Scores]]) -> list[str]:
    """Markdown: a row for each model and context; F1 also less that of the first model on the same questions."""
    lines = [
        "| model | context | exact match | answer contained | F1 | F1 minus the first |",
        "|---|---|---|---|---|---|",
    ]
    first = next(iter(scores.values()), {})
    for name, contexts in scores.items():
        for kind, found in contexts.items():
            exact, contained, f1 = found.intervals()
            gain = "" if contexts is first else str(paired_difference(found.f1, first[kind].f1))
            lines.append(f"| {name} | {CONTEXTS[kind]} | {exact} | {contained} | {f1} | {gain} |")
    return lines


def costs_of_noise(scores: Mapping[str, Mapping[ContextKind, Scores]]) -> list[str]:
    """Markdown: for each model, what a random passage beside the relevant one changes, question by question."""
    lines = ["| model | answer contained: with a random passage minus without | F1 |", "|---|---|---|"]
    for name, contexts in scores.items():
        mixed, alone = contexts["dgr"], contexts["dg"]
        contained = paired_difference(mixed.contained, alone.contained)
        lines.append(f"| {name} | {contained} | {paired_difference(mixed.f1, alone.f1)} |")
    return lines
