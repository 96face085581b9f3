"""Dense retrieval over vectors in memory: every inner product is taken, so that nothing is missed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mainspring.rag.embedding.embedder import Embedder, Vectors
from mainspring.rag.retrieval.hits import Ranking, best


@dataclass(frozen=True)
class DenseIndex:
    """Unit vectors of N passages [N, D] and the model that made them; implements `Retriever`."""

    vectors: Vectors
    embedder: Embedder

    def scores(self, vector: Vectors) -> npt.NDArray[np.float32]:
        """The cosine of a unit vector [D] and each passage: [N]."""
        scores: npt.NDArray[np.float32] = self.vectors @ vector
        return scores

    def search(self, query: str, k: int, allowed: npt.NDArray[np.bool_] | None = None) -> Ranking:
        """The k passages nearest to the query."""
        return best(self.scores(self.embedder.embed_queries([query])[0]), k, allowed)
