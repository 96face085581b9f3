"""Vectors of every passage's sentences: a passage is as near to a question as the nearest of itself and its sentences.

One vector for a whole passage blurs what its sentences say, and a question is mostly about one of them. The vectors
are made at indexing time and kept on disk by the passage's content (2 bytes a number); a search looks only at those
of its candidates. What it gains: docs/results/rag.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mainspring.rag.chunking.sentences import sentence_spans
from mainspring.rag.embedding.embedder import Embedder, Progress
from mainspring.rag.search.stage_cache import StageCache

_AT_ONCE = 64


class Sentences(Protocol):
    """Knows how near a question is to the nearest sentence of a passage."""

    def prepare(self, passages: Sequence[str], progress: Progress | None = None) -> None:
        """Makes what searches among these passages will need; `progress` hears of passages."""
        ...

    def cosines(self, vector: npt.NDArray[np.float32], passages: Sequence[str]) -> npt.NDArray[np.float32]:
        """[N]: the cosine of a unit vector [D] and each passage's nearest sentence."""
        ...


class SentenceVectors:
    """Sentence vectors in a directory. Implements `Sentences`; thread-safe if its embedder is."""

    def __init__(self, directory: Path, embedder: Embedder) -> None:
        self._cache = StageCache(directory)
        self._embedder = embedder

    def prepare(self, passages: Sequence[str], progress: Progress | None = None) -> None:
        """Embeds and keeps the sentences of those that are not there yet; `progress` hears of passages."""
        for first in range(0, len(passages), _AT_ONCE):
            part = passages[first : first + _AT_ONCE]
            self._vectors(part)
            if progress is not None:
                progress(len(part))

    def cosines(self, vector: npt.NDArray[np.float32], passages: Sequence[str]) -> npt.NDArray[np.float32]:
        """[N]: the cosine of a unit vector [D] and each passage's nearest sentence; what is not there is embedded."""
        nearest = [float((rows.astype(np.float32) @ vector).max()) for rows in self._vectors(passages)]
        return np.array(nearest, dtype=np.float32)

    def _vectors(self, passages: Sequence[str]) -> list[npt.NDArray[np.float16]]:
        """For each passage its sentences' vectors [S, D]."""
        keys = [
            hashlib.sha256(json.dumps([self._embedder.name, text]).encode()).hexdigest() for text in passages
        ]

        def embed(missing: list[int]) -> list[npt.NDArray[np.float16]]:
            pieces = [self._pieces(passages[i]) for i in missing]
            vectors = self._embedder.embed_passages([piece for part in pieces for piece in part])
            borders = np.cumsum([len(part) for part in pieces])[:-1]
            return [rows.astype(np.float16) for rows in np.split(vectors, borders)]

        return self._cache.get_rows("sentences", keys, embed)

    def _pieces(self, passage: str) -> list[str]:
        """Its sentences, those beyond the model's window in halves; a passage without any is its own."""
        found = [passage[start:end] for start, end in sentence_spans(passage)] or [passage]
        return [piece for sentence in found for piece in self._fitting(sentence)]

    def _fitting(self, text: str) -> list[str]:
        spans = self._embedder.spans(text)
        if self._embedder.count(text) <= self._embedder.window:
            return [text]
        middle = spans[len(spans) // 2][0]
        return [*self._fitting(text[:middle]), *self._fitting(text[middle:])]
