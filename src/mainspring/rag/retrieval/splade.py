"""SPLADE (arXiv 2107.05720): sparse vectors over the vocabulary by a masked language model, searched by postings.

A text's weight for a word is the maximum over its tokens of log(1 + relu(logit)), so that words that it implies count
too. No such weights come as a package: this runs where the user has a Hugging Face directory of a BERT with its
masked-language head (`naver/splade-cocondenser-ensembledistil` and its kin).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from mainspring.errors import CheckpointError
from mainspring.formats.safetensors_file import CheckpointReader
from mainspring.model.encoder import load_encoder
from mainspring.rag.embedding.embedder import BertTokens, batches_by_length, cut
from mainspring.rag.retrieval.hits import best
from mainspring.rag.search.stage_cache import StageCache
from mainspring.rag.stores.field_columns import FieldColumns
from mainspring.rag.stores.store import Filter, Hit, VectorStore, kind_of

_WINDOW = 512
_BATCH_TOKENS = 1024  # each takes a row of the whole vocabulary
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_HEAD = "cls.predictions"


@dataclass(frozen=True)
class SparseVector:
    """Words of the vocabulary [W], ascending, and their weights [W], all above 0."""

    words: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]


class SpladeModel:
    """Texts in, sparse vectors out. Thread-safe: nothing changes after construction."""

    def __init__(self, directory: Path) -> None:
        """Raises CheckpointError if it has no masked-language head, and what `load_encoder` raises."""
        self._encoder = load_encoder(directory)
        self._tokens = BertTokens(str(directory / "tokenizer.json"))
        self._window = min(_WINDOW, self._encoder.config.max_positions)
        reader = CheckpointReader(directory)
        if f"{_HEAD}.bias" not in reader:
            raise CheckpointError(f"{directory} has no masked-language head ({_HEAD}.bias): SPLADE needs one")

        def stored(name: str) -> Tensor:
            entry = reader.entry(f"{_HEAD}.{name}")
            return (
                torch.frombuffer(bytearray(entry.data), dtype=_DTYPES[entry.dtype])
                .reshape(entry.shape)
                .float()
            )

        self._dense, self._dense_bias = stored("transform.dense.weight"), stored("transform.dense.bias")
        self._norm, self._norm_bias = stored("transform.LayerNorm.weight"), stored("transform.LayerNorm.bias")
        self._bias = stored("bias")
        self.vocabulary = len(self._bias)
        self.name = (
            f"{directory.resolve().name}-{hashlib.sha256(self._bias.numpy().tobytes()).hexdigest()[:12]}"
        )

    def vectors(self, texts: Sequence[str]) -> list[SparseVector]:
        """One for each text; a text beyond the window counts by its pieces, the greatest weight of each word."""
        pieces: list[list[int]] = []
        owners: list[int] = []
        for owner, ids in enumerate(self._tokens.encode(texts)):
            inner, room = ids[1:-1], self._window - 2
            for first in range(0, max(len(inner), 1), room):
                pieces.append([ids[0], *inner[first : first + room], ids[-1]])
                owners.append(owner)
        found = torch.zeros(len(texts), self.vocabulary)
        for batch in batches_by_length([len(p) for p in pieces], _BATCH_TOKENS):
            with torch.inference_mode():
                weights = self._weights([cut(pieces[i], self._window) for i in batch])
            for row, index in enumerate(batch):
                found[owners[index]] = torch.maximum(found[owners[index]], weights[row])
        return [_sparse(row) for row in found.numpy()]

    def _weights(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """[B, V]."""
        hidden = F.gelu(F.linear(self._encoder.hidden_states(ids).float(), self._dense, self._dense_bias))
        eps = self._encoder.config.layer_norm_eps
        hidden = F.layer_norm(hidden, self._norm.shape, self._norm, self._norm_bias, eps)
        logits = F.linear(hidden, self._encoder.words.float(), self._bias)
        lengths = torch.tensor([len(x) for x in ids])
        return torch.segment_reduce(torch.log1p(torch.relu(logits)), "max", lengths=lengths)


@dataclass(frozen=True)
class SpladeIndex:
    """Postings of a store's chunks by SPLADE's words. Implements `Lexical`."""

    model: SpladeModel
    ids: list[str]
    fields: FieldColumns
    offsets: npt.NDArray[np.int64]  # [V + 1]: word w's postings are [offsets[w], offsets[w + 1])
    passages: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    version: str

    def __len__(self) -> int:
        return len(self.ids)

    def search(self, query: str, k: int, where: Filter = ()) -> list[Hit]:
        """The k chunks of greatest inner product with the query, of those that share a word with it."""
        vector = self.model.vectors([query])[0]
        total = np.zeros(len(self.ids), dtype=np.float32)
        for word, weight in zip(vector.words.tolist(), vector.weights.tolist(), strict=True):
            span = slice(self.offsets[word], self.offsets[word + 1])
            total[self.passages[span]] += weight * self.weights[span]
        ranking = best(total, k, self.fields.allowed(where), positive=True)
        return [Hit(self.ids[p], float(s)) for p, s in zip(ranking.positions, ranking.scores, strict=True)]

    @staticmethod
    def build(store: VectorStore, model: SpladeModel, cache: StageCache) -> SpladeIndex:
        """The index of the store's present contents; vectors of chunks that the cache holds are not made again."""
        version = store.version()
        chunks = list(store.scan())
        texts = [chunk.indexed_text for chunk in chunks]

        def encode(missing: list[int]) -> list[npt.NDArray[np.float32]]:
            made = model.vectors([texts[i] for i in missing])
            return [np.stack([vector.words.astype(np.float32), vector.weights]) for vector in made]

        rows = []
        for first in range(0, len(texts), 64):
            part = range(first, min(first + 64, len(texts)))
            kept = cache.get_rows(
                "splade",
                [[model.name, texts[i]] for i in part],
                lambda missing, part=part: encode([part[i] for i in missing]),  # type: ignore[misc]  # a lambda's default has no type
            )
            rows += kept
        words = np.concatenate([np.empty(0, np.int32), *(row[0].astype(np.int32) for row in rows)])
        weights = np.concatenate([np.empty(0, np.float32), *(row[1] for row in rows)])
        places = np.repeat(np.arange(len(rows), dtype=np.int32), [row.shape[1] for row in rows])
        order = np.argsort(words, kind="stable")
        counts = np.bincount(words, minlength=model.vocabulary)
        fields = FieldColumns(
            ([c.file for c in chunks], [kind_of(c.file) for c in chunks], [c.title for c in chunks])
        )
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return SpladeIndex(
            model, [c.id for c in chunks], fields, offsets, places[order], weights[order], version
        )


def _sparse(row: npt.NDArray[np.float32]) -> SparseVector:
    words = np.flatnonzero(row > 0).astype(np.int32)
    return SparseVector(words, row[words])
