"""SPLADE's vectors are those of transformers' masked language model, and its postings find what they should."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from mainspring.errors import CheckpointError, ModelNotFoundError
from mainspring.rag.assembly import open_lexical
from mainspring.rag.retrieval.splade import SpladeIndex, SpladeModel
from mainspring.rag.search.stage_cache import StageCache
from mainspring.rag.stores.store import Condition
from mainspring.rag.strategy import RetrieveStep, Strategy
from rag.test_index import open_index, write

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "fox",
    "mice",
    "whale",
    "krill",
    "oak",
    "rain",
    "the",
    "eats",
    ".",
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of random weights with its head, as transformers saves it."""
    from transformers import BertConfig, BertForMaskedLM, BertTokenizer

    path = tmp_path_factory.mktemp("splade")
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=24, initializer_range=0.3, **sizes)
    BertForMaskedLM(config).save_pretrained(path)
    BertTokenizer(vocab={word: n for n, word in enumerate(WORDS)}).save_pretrained(path)
    return path


def expected(directory: Path, ids: list[int]) -> np.ndarray:
    from transformers import BertForMaskedLM

    model = BertForMaskedLM.from_pretrained(directory).eval()
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    return torch.log1p(torch.relu(logits)).max(0).values.numpy()


def test_the_weights_are_those_of_transformers_whatever_the_batch(directory: Path) -> None:
    model = SpladeModel(directory)
    texts = ["the fox eats mice .", "krill", "oak rain oak", ""]
    ids = [[2, 10, 4, 11, 5, 12, 3], [2, 7, 3], [2, 8, 9, 8, 3], [2, 3]]
    for vector, row in zip(model.vectors(texts), ids, strict=True):
        dense = np.zeros(len(WORDS), np.float32)
        dense[vector.words] = vector.weights
        np.testing.assert_allclose(dense, expected(directory, row), atol=2e-5)
        assert (vector.weights > 0).all()


def test_a_text_beyond_the_window_counts_by_its_pieces(directory: Path) -> None:
    model = SpladeModel(directory)
    first, second = ["fox"] * 22, ["krill"] * 5
    found = model.vectors([" ".join([*first, *second])])[0]
    dense = np.zeros(len(WORDS), np.float32)
    dense[found.words] = found.weights
    pieces = [expected(directory, [2, *[4] * 22, 3]), expected(directory, [2, *[7] * 5, 3])]
    np.testing.assert_allclose(dense, np.maximum(*pieces), atol=2e-5)


def test_an_index_ranks_by_inner_product_filters_and_keeps_its_vectors(
    directory: Path, tmp_path: Path
) -> None:
    index = open_index(tmp_path / "index")
    index.update(
        write(tmp_path / "docs", a="the fox eats mice .", b="the whale eats krill .", c="oak rain .")
    )
    model = SpladeModel(directory)
    built = SpladeIndex.build(index.store, model, StageCache(tmp_path / "kept"))
    chunks = list(index.store.scan())
    assert len(built) == len(chunks) == 3
    query = model.vectors(["krill rain"])[0]
    scores = {}
    for chunk, vector in zip(chunks, model.vectors([c.indexed_text for c in chunks]), strict=True):
        dense = np.zeros(len(WORDS), np.float32)
        dense[vector.words] = vector.weights
        scores[chunk.id] = float(dense[query.words] @ query.weights)
    hits = built.search("krill rain", 3)
    assert [h.id for h in hits] == sorted(scores, key=lambda i: -scores[i])
    assert [h.score for h in hits] == pytest.approx(sorted(scores.values(), reverse=True), abs=1e-4)
    only = built.search("krill rain", 3, [Condition("file", "a.md")])
    assert [h.id for h in only] == [c.id for c in chunks if c.file == "a.md"]
    cache = StageCache(tmp_path / "kept")
    SpladeIndex.build(index.store, model, cache)
    assert (cache.hits, cache.misses) == (3, 0)


def test_a_strategy_without_a_usable_model_is_refused(
    directory: Path, tmp_path: Path, minilm: object
) -> None:
    index = open_index(tmp_path / "index")
    wanted = Strategy(retrieve=RetrieveStep(lexical="splade", splade=str(tmp_path / "absent")))
    with pytest.raises(ModelNotFoundError, match=r"retrieve\.splade"):
        open_lexical(tmp_path / "index", wanted, index.store)
    from mainspring.rag.embedding.models import model_directory

    headless = str(model_directory("all-minilm-l6-v2", "embedder"))
    wanted = dataclasses.replace(wanted, retrieve=RetrieveStep(lexical="splade", splade=headless))
    with pytest.raises(CheckpointError, match="masked-language head"):
        open_lexical(tmp_path / "index", wanted, index.store)
