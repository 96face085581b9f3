"""What a search finds, and the protocol of what finds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Ranking:
    """Positions of passages in a corpus with their scores, the best first. No position occurs twice."""

    positions: npt.NDArray[np.int64]  # [K]
    scores: npt.NDArray[np.float32]  # [K]

    def __len__(self) -> int:
        return len(self.positions)

    def top(self, k: int) -> Ranking:
        """The first k."""
        return Ranking(self.positions[:k], self.scores[:k])


class Retriever(Protocol):
    """Finds passages for a query by their position in the corpus that it was built for."""

    def search(self, query: str, k: int, allowed: npt.NDArray[np.bool_] | None = None) -> Ranking:
        """At most k passages, the best first; `allowed` [N] leaves out the others (a metadata filter)."""
        ...


def best(
    scores: npt.NDArray[np.float32],
    k: int,
    allowed: npt.NDArray[np.bool_] | None = None,
    positive: bool = False,
) -> Ranking:
    """The k best of scores [N]; equal scores in order of position, whatever k. `positive` keeps those above 0."""
    candidates = np.flatnonzero(allowed) if allowed is not None else np.arange(len(scores))
    if positive:
        candidates = candidates[scores[candidates] > 0]
    values = scores[candidates]
    if 0 < k < len(values):
        least = np.partition(values, len(values) - k)[len(values) - k]
        keep = np.flatnonzero(values >= least)  # k, or more where equal scores straddle the border
        candidates, values = candidates[keep], values[keep]
    order = np.argsort(-values, kind="stable")[:k]
    return Ranking(candidates[order].astype(np.int64), values[order].astype(np.float32))


def ranking_of(pairs: Sequence[tuple[int, float]]) -> Ranking:
    """A ranking of (position, score), sorted here; equal scores keep their order."""
    ordered = sorted(pairs, key=lambda pair: -pair[1])
    return Ranking(
        np.array([p for p, _ in ordered], dtype=np.int64), np.array([s for _, s in ordered], dtype=np.float32)
    )
