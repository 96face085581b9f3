"""BM25 (Robertson and Zaragoza, 2009) with the weights worked out when the index is built.

A posting holds the finished contribution of its term to its passage, so that a query adds a few arrays. The variant
is Lucene's: idf = log(1 + (N - n + 0.5) / (n + 0.5)), never negative.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mainspring.errors import ConfigError
from mainspring.formats.files import new_directory, write_json
from mainspring.rag.retrieval.hits import Ranking, best
from mainspring.rag.retrieval.terms import terms

K1 = 1.2
B = 0.75


@dataclass(frozen=True)
class Bm25Index:
    """Postings of N passages; implements `Retriever`. Term t's are [offsets[t], offsets[t + 1])."""

    vocabulary: dict[str, int]
    offsets: npt.NDArray[np.int64]  # [V + 1]
    passages: npt.NDArray[np.int32]  # [P] positions, ascending within a term
    weights: npt.NDArray[np.float32]  # [P]
    size: int

    @staticmethod
    def build(texts: Iterable[str], k1: float = K1, b: float = B) -> Bm25Index:
        """The index of the passages in their order. Raises ConfigError for k1 < 0 or b outside [0, 1]."""
        if k1 < 0 or not 0 <= b <= 1:
            raise ConfigError(f"BM25 needs k1 >= 0 and 0 <= b <= 1, got k1 {k1} and b {b}")
        vocabulary: dict[str, int] = {}
        term_ids, passages, counts, lengths = array("i"), array("i"), array("i"), array("i")
        for position, text in enumerate(texts):
            found = Counter(terms(text))
            lengths.append(found.total())
            for term, count in found.items():
                term_ids.append(vocabulary.setdefault(term, len(vocabulary)))
                passages.append(position)
                counts.append(count)
        size = len(lengths)
        ids = np.frombuffer(term_ids, dtype=np.int32) if term_ids else np.empty(0, np.int32)
        order = np.argsort(ids, kind="stable")
        frequency = np.bincount(ids, minlength=len(vocabulary))
        offsets = np.concatenate([[0], np.cumsum(frequency)]).astype(np.int64)
        where = np.array(passages, dtype=np.int32)[order]
        tf = np.array(counts, dtype=np.float64)[order]
        length = np.array(lengths, dtype=np.float64)
        mean = length.mean() if size and length.any() else 1.0
        idf = np.log1p((size - frequency + 0.5) / (frequency + 0.5))
        weights = np.repeat(idf, frequency) * tf * (k1 + 1) / (tf + k1 * (1 - b + b * length[where] / mean))
        return Bm25Index(vocabulary, offsets, where, weights.astype(np.float32), size)

    def scores(self, query: str) -> npt.NDArray[np.float32]:
        """[N]: the score of every passage; a term counts as often as the query has it."""
        total = np.zeros(self.size, dtype=np.float32)
        for term, count in Counter(terms(query)).items():
            index = self.vocabulary.get(term)
            if index is not None:
                span = slice(self.offsets[index], self.offsets[index + 1])
                total[self.passages[span]] += count * self.weights[span]
        return total

    def search(self, query: str, k: int, allowed: npt.NDArray[np.bool_] | None = None) -> Ranking:
        """Passages that share a term with the query, at most k."""
        return best(self.scores(query), k, allowed, positive=True)

    def save(self, path: Path) -> None:
        """Writes a directory, whole or not at all. Raises OSError if there is one with contents."""
        with new_directory(path) as directory:
            for name in ("offsets", "passages", "weights"):
                with open(directory / f"{name}.npy", "wb") as file:
                    np.save(file, getattr(self, name), allow_pickle=False)
            write_json(directory / "vocabulary.json", {"size": self.size, "terms": list(self.vocabulary)})

    @staticmethod
    def load(path: Path) -> Bm25Index:
        """The index in a directory that `save` wrote, arrays mapped. Raises OSError or ValueError if damaged."""
        stored = json.loads((path / "vocabulary.json").read_bytes())
        names = ("offsets", "passages", "weights")
        offsets, passages, weights = (
            np.load(path / f"{n}.npy", mmap_mode="r", allow_pickle=False) for n in names
        )
        if (
            len(offsets) != len(stored["terms"]) + 1
            or len(passages) != len(weights)
            or offsets[-1] != len(weights)
        ):
            raise ValueError(f"{path} holds arrays that do not fit together")
        vocabulary = {term: index for index, term in enumerate(stored["terms"])}
        return Bm25Index(vocabulary, offsets, passages, weights, int(stored["size"]))
