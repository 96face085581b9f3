"""Passages by their nearest sentence: what is kept, what is computed, and what a search makes of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from mainspring.errors import ConfigError
from mainspring.rag.chunking.sentences import sentences
from mainspring.rag.embedding.embedder import Embedder
from mainspring.rag.pipeline import Parts, Pipeline
from mainspring.rag.retrieval.lexical import LexicalIndex
from mainspring.rag.retrieval.sentence_vectors import SentenceVectors
from mainspring.rag.strategy import IndexStep, RerankStep, RetrieveStep, Strategy
from rag.fakes import WordEmbedder
from rag.test_index import open_index, write

LONG = "word " * 100 + "end."


def test_a_passage_is_as_near_as_its_nearest_sentence_and_embedded_once(tmp_path: Path) -> None:
    embedder = WordEmbedder()
    passages = ["The fox hunts. The oak grows slowly. It rains.", "Whales eat krill.", "   ", LONG]
    kept = SentenceVectors(tmp_path / "kept", embedder)
    heard: list[int] = []
    kept.prepare(passages, heard.append)
    assert sum(heard) == len(passages)
    count = embedder.embedded
    query = embedder.embed_queries(["the oak grows"])[0]
    found = SentenceVectors(tmp_path / "kept", embedder).cosines(query, passages)
    assert embedder.embedded == count
    expected = max(float(v @ query) for v in embedder.embed_passages(sentences(passages[0])))
    assert found[0] == pytest.approx(expected, abs=2e-3)  # kept in float16
    assert found[0] > found[1:].max()
    other = WordEmbedder("other")
    SentenceVectors(tmp_path / "kept", other).cosines(query, passages)
    assert other.embedded > 0  # vectors of another model are others


def test_a_search_by_sentences_finds_what_a_whole_passage_blurs(tmp_path: Path) -> None:
    embedder = WordEmbedder(window=200)
    noise = " ".join(f"Word{n} stands{n} here{n}." for n in range(20))
    documents = {
        "long": f"{noise} Krill feeds whales. {noise}",
        "short": "Krill feeds nobody at all, they say.",
    }
    index = open_index(tmp_path / "index", IndexStep(size=190, overlap=0), embedder)
    index.update(write(tmp_path / "docs", **documents))
    lexical = LexicalIndex.open(tmp_path / "index" / "bm25", index.store)
    parts = Parts(embedder, index.store, lexical, sentences=SentenceVectors(tmp_path / "sentences", embedder))
    plain = Strategy(retrieve=RetrieveStep(method="dense"), rerank=RerankStep("none"))
    fine = dataclasses.replace(plain, retrieve=RetrieveStep(method="dense", sentences=True))
    question = "Krill feeds whales"
    assert Pipeline(plain, parts).search(question)[0].chunk.file == "short.md"
    found = Pipeline(fine, parts).search(question)
    assert found[0].chunk.file == "long.md"
    assert found[0].score == pytest.approx((3 / 4) ** 0.5, abs=0.01)  # its full stop is a word of its own
    hybrid = dataclasses.replace(plain, retrieve=RetrieveStep(method="hybrid", sentences=True))
    assert Pipeline(hybrid, parts).search(question)[0].chunk.file == "long.md"
    with pytest.raises(ConfigError, match="sentence vectors"):
        Pipeline(fine, dataclasses.replace(parts, sentences=None)).search(question)


def test_with_the_real_model_the_answering_sentence_stands_out_of_its_passage(
    minilm: Embedder, tmp_path: Path
) -> None:
    passage = "The moon is grey. The museum's founder was born in Vienna. Bread is baked at night. Dogs like the snow."
    query = minilm.embed_queries(["In which city was the founder of the museum born?"])[0]
    found = SentenceVectors(tmp_path, minilm).cosines(query, [passage, passage[:17]])
    assert found[0] > float(minilm.embed_passages([passage])[0] @ query)
    assert found[0] > found[1]
    assert np.all(np.abs(found) <= 1.001)
