"""Shorter passages made of their own sentences: those that have most to do with the question stay, in their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mainspring.rag.chunking.sentences import sentences
from mainspring.rag.embedding.embedder import Embedder
from mainspring.rag.retrieval.bm25 import Bm25Index


class Summariser(Protocol):
    """Shortens passages for a question."""

    def summarise(self, question: str, passages: Sequence[str], ratio: float) -> list[str]:
        """One text for each passage, about `ratio` of all their characters together; it may be empty."""
        ...


@dataclass(frozen=True)
class Bm25Extraction:
    """Sentences by their BM25 score among all sentences of the passages."""

    def summarise(self, question: str, passages: Sequence[str], ratio: float) -> list[str]:
        pieces = [sentences(passage) for passage in passages]
        scores = Bm25Index.build(s for piece in pieces for s in piece).scores(question)
        return select(pieces, scores, ratio)


@dataclass(frozen=True)
class EmbeddingExtraction:
    """Sentences by the cosine of their embedding and the question's.

    With a `least` cosine it stands in for Recomp (arXiv 2310.04408): there too a sentence that helps nothing is left
    out even where there is room, and all may be.
    """

    embedder: Embedder
    least: float = -1.0

    def summarise(self, question: str, passages: Sequence[str], ratio: float) -> list[str]:
        pieces = [sentences(passage) for passage in passages]
        flat = [part for piece in pieces for s in piece for part in [_fitting(s, self.embedder)]]
        if not flat:
            return ["" for _ in passages]
        scores = self.embedder.embed_passages(flat) @ self.embedder.embed_queries([question])[0]
        return select(pieces, np.where(scores < self.least, -np.inf, scores).astype(np.float32), ratio)


def select(pieces: Sequence[Sequence[str]], scores: npt.NDArray[np.float32], ratio: float) -> list[str]:
    """The best sentences of all passages together, until their characters pass `ratio` of the whole.

    At least one stays unless all scores are -inf; those with -inf never do. Equal scores: the earlier one first.
    """
    flat = [(owner, sentence) for owner, piece in enumerate(pieces) for sentence in piece]
    budget = ratio * sum(len(sentence) for _, sentence in flat)
    kept: set[int] = set()
    used = 0
    for index in np.argsort(-scores, kind="stable").tolist():
        length = len(flat[index][1])
        if scores[index] == -np.inf:
            break
        if kept and used + length > budget:
            continue
        kept.add(index)
        used += length
    texts: list[list[str]] = [[] for _ in pieces]
    for index in sorted(kept):
        texts[flat[index][0]].append(flat[index][1])
    return [" ".join(text) for text in texts]


def _fitting(sentence: str, embedder: Embedder) -> str:
    """As much of a sentence as the embedder's window holds: enough to judge it by."""
    spans = embedder.spans(sentence)
    room = embedder.window - 2
    return sentence if len(spans) <= room else sentence[: spans[room - 1][1]]
