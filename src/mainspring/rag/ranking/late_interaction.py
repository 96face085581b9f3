"""Late interaction (ColBERT, arXiv 2004.12832): a query token's best match in the passage, summed over the query.

Passages are encoded ahead of the query, token by token. The packaged answerai-colbert-small-v1 lacks the projection to
96 dimensions that its authors trained: its hidden states are compared as they are, which is weaker than ColBERT.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from mainspring.rag.embedding.embedder import cut
from mainspring.rag.embedding.models import DEFAULT_LATE_INTERACTION, model_directory
from mainspring.rag.embedding.onnx_model import OnnxModel

_WINDOW = 512
TokenVectors = npt.NDArray[np.float16]  # [tokens, D], each of length 1


class LateInteraction:
    """Token vectors of an ONNX model and their MaxSim. Implements `Reranker`; passages are remembered."""

    def __init__(
        self, model: str = DEFAULT_LATE_INTERACTION, threads: int | None = None, remembered: int = 4096
    ) -> None:
        """`remembered` passages keep their vectors in memory. Raises ModelNotFoundError and CheckpointError."""
        self._model = OnnxModel(model_directory(model, "late-interaction"), threads)
        self._cached = lru_cache(maxsize=remembered)(self._encode_one)

    def encode(self, texts: Sequence[str]) -> list[TokenVectors]:
        """One [tokens, D] array a text, special tokens left out; a text beyond the window keeps its beginning."""
        ids = [cut(x, _WINDOW) for x in self._model.tokens.encode(texts)]
        out: list[TokenVectors | None] = [None] * len(ids)
        for batch, states, lengths in self._model.run(ids):
            for index, rows, length in zip(batch, states, lengths, strict=True):
                inner = rows[1 : length - 1]
                norms = np.linalg.norm(inner, axis=1, keepdims=True)
                out[index] = (inner / np.maximum(norms, 1e-12)).astype(np.float16)
        return [vectors for vectors in out if vectors is not None]

    def scores(self, query: str, passages: Sequence[str]) -> npt.NDArray[np.float32]:
        """[N]: the mean over query tokens of the greatest cosine to a token of the passage."""
        query_vectors = self.encode([query])[0]
        return np.array([max_sim(query_vectors, self._cached(p)) for p in passages], dtype=np.float32)

    def _encode_one(self, text: str) -> TokenVectors:
        return self.encode([text])[0]


def max_sim(query: TokenVectors, passage: TokenVectors) -> float:
    """The mean over query tokens [Q, D] of the greatest product with a passage token [P, D]; -1 if empty."""
    if len(query) == 0 or len(passage) == 0:
        return -1.0
    similarity = query.astype(np.float32) @ passage.astype(np.float32).T
    return float(similarity.max(1).mean())
