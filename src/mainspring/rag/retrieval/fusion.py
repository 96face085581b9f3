"""One ranking from several: weighted sums of scaled scores, and reciprocal ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mainspring.errors import ConfigError
from mainspring.rag.retrieval.hits import Ranking, ranking_of

PAPER_ALPHA = 0.3  # S = alpha · sparse + dense (arXiv 2407.01219, section 3.4)
RRF_K = 60  # Cormack, Clarke and Büttcher, SIGIR 2009


def min_max(scores: npt.NDArray[np.float32], paper_compat: bool = False) -> npt.NDArray[np.float32]:
    """Scores scaled to [0, 1]. Equal scores all become 1: they are all the best.

    The authors' code divides by their zero range; `paper_compat` does as much, and gives not-a-number.
    """
    if len(scores) == 0:
        return scores
    low, spread = scores.min(), scores.max() - scores.min()
    if spread == 0 and not paper_compat:
        return np.ones_like(scores)
    with np.errstate(invalid="ignore"):
        scaled: npt.NDArray[np.float32] = (scores - low) / spread
    return scaled


def weighted_fusion(
    sparse: Ranking, dense: Ranking, k: int, alpha: float = PAPER_ALPHA, paper_compat: bool = False
) -> Ranking:
    """S = alpha · sparse + dense, each scaled to [0, 1] over its own list; a passage that a list lacks has 0 there.

    Raises ConfigError for a negative alpha.
    """
    if alpha < 0:
        raise ConfigError(f"the weight of sparse scores must be at least 0, got {alpha}")
    total: dict[int, float] = {}
    for ranking, weight in ((dense, 1.0), (sparse, alpha)):
        scaled = min_max(ranking.scores, paper_compat)
        for position, score in zip(ranking.positions.tolist(), scaled.tolist(), strict=True):
            total[position] = total.get(position, 0.0) + weight * score
    return ranking_of(list(total.items())).top(k)


def reciprocal_rank_fusion(rankings: Sequence[Ranking], k: int, rrf_k: int = RRF_K) -> Ranking:
    """The sum of 1 / (rrf_k + rank) over the rankings, ranks counted from 1."""
    total: dict[int, float] = {}
    for ranking in rankings:
        for rank, position in enumerate(ranking.positions.tolist(), 1):
            total[position] = total.get(position, 0.0) + 1 / (rrf_k + rank)
    return ranking_of(list(total.items())).top(k)
