"""Late interaction whose passages are encoded at indexing time and kept on disk: the stand-in for TILDEv2.

As there (arXiv 2108.08513), a question costs one short encoding and no passage is read by a model again. The price is
memory: about 800 bytes a token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mainspring.rag.ranking.late_interaction import LateInteraction, TokenVectors, max_sim
from mainspring.rag.search.stage_cache import StageCache

_AT_ONCE = 64


class PrecomputedLateInteraction:
    """Token vectors in a directory, by the content of the passage. Implements `Reranker`."""

    def __init__(self, directory: Path, encoder: LateInteraction) -> None:
        self._cache = StageCache(directory)
        self._encoder = encoder

    def prepare(self, passages: Sequence[str]) -> None:
        """Encodes and keeps those that are not there yet."""
        for first in range(0, len(passages), _AT_ONCE):
            self._vectors(passages[first : first + _AT_ONCE])

    def scores(self, query: str, passages: Sequence[str]) -> npt.NDArray[np.float32]:
        """[N]: as `LateInteraction.scores`; a passage that was not prepared is encoded now."""
        query_vectors = self._encoder.encode([query])[0]
        return np.array(
            [max_sim(query_vectors, vectors) for vectors in self._vectors(passages)], dtype=np.float32
        )

    def _vectors(self, passages: Sequence[str]) -> list[TokenVectors]:
        keys = [hashlib.sha256(text.encode()).hexdigest() for text in passages]

        def encode(missing: list[int]) -> list[TokenVectors]:
            return self._encoder.encode([passages[i] for i in missing])

        return self._cache.get_rows("tokens", keys, encode)
