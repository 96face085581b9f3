"""BM25 against its formula, fusion by hand, query forms, and ranking's small parts."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mainspring.errors import ConfigError
from mainspring.rag.ranking.repacking import repack
from mainspring.rag.retrieval.bm25 import Bm25Index
from mainspring.rag.retrieval.dense import DenseIndex
from mainspring.rag.retrieval.fusion import min_max, reciprocal_rank_fusion, weighted_fusion
from mainspring.rag.retrieval.hits import Ranking, best, ranking_of
from mainspring.rag.retrieval.query_forms import probes
from mainspring.rag.retrieval.terms import terms
from rag.fakes import ScriptedModel, WordEmbedder

WORDS = st.sampled_from(["cat", "dog", "cats", "running", "run", "tree", "green", "blue", "the", "of"])
TEXTS = st.lists(st.lists(WORDS, max_size=12).map(" ".join), max_size=8)


def formula(texts: list[str], query: str, k1: float, b: float) -> list[float]:
    """Lucene's BM25, passage by passage."""
    bags = [Counter(terms(text)) for text in texts]
    mean = sum(bag.total() for bag in bags) / len(bags) if any(bag.total() for bag in bags) else 1
    scores = []
    for bag in bags:
        score = 0.0
        for term in terms(query):
            n = sum(term in other for other in bags)
            idf = math.log(1 + (len(bags) - n + 0.5) / (n + 0.5))
            score += (
                idf * bag[term] * (k1 + 1) / (bag[term] + k1 * (1 - b + b * bag.total() / mean))
                if bag[term]
                else 0
            )
        scores.append(score)
    return scores


@settings(deadline=None)
@given(TEXTS, st.lists(WORDS, max_size=5).map(" ".join), st.floats(0, 3), st.floats(0, 1))
def test_bm25_is_its_formula(texts: list[str], query: str, k1: float, b: float) -> None:
    found = Bm25Index.build(texts, k1, b).scores(query)
    np.testing.assert_allclose(found, formula(texts, query, k1, b) if texts else [], rtol=1e-5, atol=1e-6)


def test_bm25_finds_only_passages_with_a_term_of_the_query_and_obeys_the_filter() -> None:
    index = Bm25Index.build(["red fox", "blue whale", "foxes are red", "nothing"])
    assert set(index.search("a fox", 10).positions.tolist()) == {0, 2}
    assert index.search("fox", 10, np.array([False, True, True, True])).positions.tolist() == [2]
    assert len(index.search("zebra", 10)) == 0
    assert len(index.search("", 10)) == 0


def test_bm25_is_the_same_after_saving_and_damage_is_noticed(tmp_path: Path) -> None:
    index = Bm25Index.build(["red fox", "blue whale", "red red whale"])
    index.save(tmp_path / "bm25")
    loaded = Bm25Index.load(tmp_path / "bm25")
    np.testing.assert_array_equal(loaded.scores("red whale"), index.scores("red whale"))
    np.save(tmp_path / "bm25" / "weights.npy", np.zeros(1, np.float32))
    with pytest.raises(ValueError, match="do not fit"):
        Bm25Index.load(tmp_path / "bm25")


@pytest.mark.parametrize(("k1", "b"), [(-1, 0.5), (1, 1.5)])
def test_bm25_refuses_parameters_outside_their_range(k1: float, b: float) -> None:
    with pytest.raises(ConfigError, match=f"k1 {k1} and b {b}"):
        Bm25Index.build([], k1, b)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=20), st.integers(1, 25))
def test_the_best_are_those_of_a_stable_sort_for_any_k(values: list[int], k: int) -> None:
    scores = np.array(values, dtype=np.float32)
    expected = sorted(range(len(values)), key=lambda i: -values[i])[:k]
    assert best(scores, k).positions.tolist() == expected


def test_the_paper_s_fusion_is_alpha_times_sparse_plus_dense_of_scaled_scores() -> None:
    sparse = ranking_of([(1, 10.0), (2, 5.0), (3, 0.0)])
    dense = ranking_of([(2, 0.9), (4, 0.5), (1, 0.1)])
    fused = weighted_fusion(sparse, dense, 10, alpha=0.3)
    assert dict(zip(fused.positions.tolist(), fused.scores.tolist(), strict=True)) == pytest.approx(
        {2: 1.15, 4: 0.5, 1: 0.3, 3: 0.0}
    )


def test_equal_scores_do_not_divide_by_zero_except_as_the_authors_do() -> None:
    equal = np.array([2.0, 2.0], dtype=np.float32)
    assert min_max(equal).tolist() == [1, 1]
    assert np.isnan(min_max(equal, paper_compat=True)).all()
    assert len(min_max(equal[:0])) == 0


def test_reciprocal_ranks_reward_agreement() -> None:
    fused = reciprocal_rank_fusion([ranking_of([(1, 9), (2, 8)]), ranking_of([(2, 0.9), (3, 0.1)])], 3)
    assert fused.positions.tolist() == [2, 1, 3]
    assert fused.scores.tolist() == pytest.approx([1 / 62 + 1 / 61, 1 / 61, 1 / 62])


def test_dense_search_is_brute_force() -> None:
    embedder = WordEmbedder()
    texts = ["red fox", "blue whale", "green tree"]
    found = DenseIndex(embedder.embed_passages(texts), embedder).search("a blue whale", 2)
    assert found.positions[0] == 1
    assert isinstance(found, Ranking)


@pytest.mark.parametrize(
    ("order", "expected"),
    [("forward", [1, 2, 3, 4, 5]), ("reverse", [5, 4, 3, 2, 1]), ("sides", [1, 3, 5, 4, 2])],
)
def test_repacking(order: str, expected: list[int]) -> None:
    assert repack([1, 2, 3, 4, 5], order) == expected
    assert repack([1, 2, 3, 4], "sides") == [1, 3, 4, 2]
    assert repack([], "sides") == []


def test_query_forms_ask_for_what_they_say() -> None:
    embedder = WordEmbedder()
    [plain] = probes("red fox?", "original", embedder, None)
    [rewritten] = probes("red fox?", "rewrite", embedder, ScriptedModel('"vulpes vulpes"'))
    assert rewritten.text == "vulpes vulpes"
    parts = probes(
        "a or b?", "decompose", embedder, ScriptedModel("1. What is a?\n2) What is b?\n\n- And c?\n4. d")
    )
    assert [p.text for p in parts] == ["a or b?", "What is a?", "What is b?", "And c?"]
    [hyde] = probes("red fox?", "hyde", embedder, ScriptedModel("foxes hunt mice"))
    assert hyde.text == "red fox?"
    np.testing.assert_allclose(hyde.vector, embedder.embed_passages(["foxes hunt mice"])[0])
    [both] = probes("red fox?", "hyde-with-query", embedder, ScriptedModel("foxes hunt mice"))
    mean = hyde.vector + plain.vector
    np.testing.assert_allclose(both.vector, mean / np.linalg.norm(mean), rtol=1e-6)


def test_a_model_that_says_nothing_leaves_the_question_as_it_is() -> None:
    [probe] = probes("red fox?", "rewrite", WordEmbedder(), ScriptedModel("  \n"))
    assert probe.text == "red fox?"


def test_a_query_form_without_its_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="'hyde' needs a language model"):
        probes("x", "hyde", WordEmbedder(), None)
