"""Query classification (arXiv 2407.01219, section 3.1): a logistic model on the embedding of the query.

The paper trains BERT on labelled queries; here the index's own embedder stands in for it, and the examples are made
from the corpus (examples.py), so that the model knows these documents.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mainspring.errors import ConfigError, EmbeddingModelChangedError, StoreError
from mainspring.formats.files import write_json
from mainspring.rag.embedding.embedder import Embedder, Vectors

FILE = "classifier.json"
_FORMAT = 1
_L2 = 0.1  # on unit vectors, whose weights must grow to say anything
_STEPS = 100
_MISSED = 0.02  # of the validation's questions that need the documents may fall below the threshold


@dataclass(frozen=True)
class QueryClassifier:
    """Weights [D] and bias on unit vectors [D] of the embedder of that name; at `threshold` and above: retrieve."""

    embedder: str
    weights: npt.NDArray[np.float64]
    bias: float
    threshold: float

    def probabilities(self, vectors: Vectors) -> npt.NDArray[np.float64]:
        """[N]: how likely each query [N, D] needs the documents."""
        return _sigmoid(vectors.astype(np.float64) @ self.weights + self.bias)

    def needs_documents(self, question: str, embedder: Embedder) -> bool:
        """Whether to retrieve for a question."""
        return bool(self.probabilities(embedder.embed_queries([question]))[0] >= self.threshold)

    def save(self, directory: Path) -> None:
        """Writes it into an index's directory."""
        stored = {
            "format": _FORMAT,
            "embedder": self.embedder,
            "threshold": self.threshold,
            "bias": self.bias,
        }
        write_json(directory / FILE, {**stored, "weights": self.weights.tolist()})

    @staticmethod
    def load(directory: Path, embedder: Embedder) -> QueryClassifier | None:
        """The one in an index's directory, None if there is none.

        Raises StoreError if it is damaged, EmbeddingModelChangedError if it was trained on another embedder.
        """
        path = directory / FILE
        try:
            stored = json.loads(path.read_bytes())
            weights = np.array(stored["weights"], dtype=np.float64)
            found = QueryClassifier(
                str(stored["embedder"]), weights, float(stored["bias"]), float(stored["threshold"])
            )
            if stored["format"] != _FORMAT or weights.ndim != 1:
                raise ValueError(f"format {stored['format']}, weights of {weights.ndim} dimensions")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path} is damaged ({error}): run `mainspring rag classify` again") from error
        if found.embedder != embedder.name or len(weights) != embedder.dimension:
            raise EmbeddingModelChangedError(
                f"{path} was trained on {found.embedder!r}, the index has {embedder.name!r}: run `mainspring rag "
                "classify` again"
            )
        return found


def train(needing: Sequence[str], free: Sequence[str], embedder: Embedder) -> QueryClassifier:
    """A classifier of queries that need the documents and those that do not; both classes weigh the same.

    Every fifth is kept for the threshold: at most 0.5, and lower where else more than 2% of the needing would be
    missed, because an answer without its document is the worse mistake. Raises ConfigError below 10 of a kind.
    """
    if min(len(needing), len(free)) < 10:
        raise ConfigError(
            f"a classifier needs at least 10 queries of each kind, got {len(needing)} that need the documents and "
            f"{len(free)} that do not: index more text"
        )
    vectors = [embedder.embed_queries(list(texts)).astype(np.float64) for texts in (needing, free)]
    chosen = [np.arange(len(v)) % 5 != 0 for v in vectors]
    weights, bias = _logistic(vectors[0][chosen[0]], vectors[1][chosen[1]])
    kept = _sigmoid(vectors[0][~chosen[0]] @ weights + bias)
    threshold = min(0.5, float(np.quantile(kept, _MISSED)))
    return QueryClassifier(embedder.name, weights, bias, threshold)


def _logistic(
    ones: npt.NDArray[np.float64], zeros: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], float]:
    """(weights [D], bias) of least mean log loss, classes weighing the same, with _L2 / N on the weights.

    Newton's method with halved steps where a whole one overshoots.
    """
    count = len(ones) + len(zeros)
    x = np.hstack([np.vstack([ones, zeros]), np.ones((count, 1))])
    y = np.repeat([1.0, 0.0], [len(ones), len(zeros)])
    share = np.repeat([0.5 / len(ones), 0.5 / len(zeros)], [len(ones), len(zeros)])
    penalty = np.full(x.shape[1], _L2 / count)
    penalty[-1] = 1e-9  # the bias is free; this keeps the system regular

    def loss(w: npt.NDArray[np.float64]) -> float:
        z = x @ w
        return float(share @ (np.logaddexp(0, z) - y * z) + 0.5 * (penalty * w) @ w)

    w = np.zeros(x.shape[1])
    for _ in range(_STEPS):
        p = _sigmoid(x @ w)
        gradient = x.T @ (share * (p - y)) + penalty * w
        if np.abs(gradient).max() < 1e-8:
            break
        hessian = (x * (share * p * (1 - p))[:, None]).T @ x + np.diag(penalty)
        step = np.linalg.solve(hessian, gradient)
        size = 1.0
        while loss(w - size * step) > loss(w) and size > 1e-6:
            size /= 2
        w = w - size * step
    return w[:-1], float(w[-1])


def _sigmoid(z: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    found: npt.NDArray[np.float64] = 1 / (1 + np.exp(-np.clip(z, -500, 500)))
    return found
