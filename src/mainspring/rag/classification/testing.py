"""How well queries are told apart: precision and recall of "needs the documents"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mainspring.errors import ConfigError
from mainspring.rag.classification.classifier import QueryClassifier
from mainspring.rag.embedding.embedder import Embedder


@dataclass(frozen=True)
class ClassificationFigures:
    """Of `needing` and `free` queries: the share of retrieved ones that need it, and of needing ones retrieved.

    `passed_by` is the share of free queries that are not retrieved for.
    """

    precision: float
    recall: float
    passed_by: float
    needing: int
    free: int

    def __str__(self) -> str:
        return (
            f"precision {self.precision:.3f}, recall {self.recall:.3f} ({self.needing} that need the documents, "
            f"{self.free} that do not, {self.passed_by:.3f} of these passed by)"
        )


def evaluate_classifier(
    classifier: QueryClassifier, embedder: Embedder, needing: Sequence[str], free: Sequence[str]
) -> ClassificationFigures:
    """The figures on queries that it has not learnt from. Raises ConfigError if a kind is missing."""
    if not needing or not free:
        raise ConfigError(f"a test needs queries of both kinds, got {len(needing)} and {len(free)}")
    right, wrong = (
        int((classifier.probabilities(embedder.embed_queries(list(texts))) >= classifier.threshold).sum())
        for texts in (needing, free)
    )
    precision = right / (right + wrong) if right + wrong else 0.0
    return ClassificationFigures(
        precision, right / len(needing), 1 - wrong / len(free), len(needing), len(free)
    )
