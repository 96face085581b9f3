"""Measures against ir-measures, the bootstrap against what is known, SQuAD's format, the cache of stages."""

from __future__ import annotations

import json
import random
from pathlib import Path

import ir_measures
import numpy as np
import pytest
from ir_measures import RR, R, nDCG

from mainspring.errors import ConfigError, DocumentError
from mainspring.rag.evaluation import measures
from mainspring.rag.evaluation.bootstrap import bootstrap, paired_difference
from mainspring.rag.evaluation.squad import load_squad
from mainspring.rag.generation.abstention import calibrate, evaluate
from mainspring.rag.search.stage_cache import StageCache


def test_measures_are_those_of_ir_measures_on_random_rankings() -> None:
    generator = random.Random(7)
    for _ in range(20):
        ranked = generator.sample(range(60), generator.randint(0, 30))
        relevant = set(generator.sample(range(60), generator.randint(1, 8)))
        qrels = [ir_measures.Qrel("q", str(p), 1) for p in relevant]
        run = [ir_measures.ScoredDoc("q", str(p), -rank) for rank, p in enumerate(ranked)]
        expected = ir_measures.calc_aggregate([RR @ 10, R @ 10, nDCG @ 10], qrels, run)
        assert measures.reciprocal_rank(ranked, relevant) == pytest.approx(expected[RR @ 10])
        assert measures.recall(ranked, relevant) == pytest.approx(expected[R @ 10])
        assert measures.ndcg(ranked, relevant) == pytest.approx(expected[nDCG @ 10])


def test_exact_match_is_equality_and_the_authors_is_containment() -> None:
    assert measures.exact_match("The Denver Broncos!", ["Denver Broncos"]) == 1
    assert measures.exact_match("It was the Denver Broncos", ["Denver Broncos"]) == 0
    assert measures.exact_match("It was the Denver Broncos", ["Denver Broncos"], paper_compat=True) == 1


def test_f1_counts_words_as_often_as_both_have_them() -> None:
    assert measures.token_f1("red red fox", ["red fox"]) == pytest.approx(0.8)
    assert measures.token_f1("whale", ["red fox", "blue whale"]) == pytest.approx(2 / 3)
    assert measures.token_f1("", ["x"]) == 0
    assert measures.token_f1("the", ["a"]) == 1


def test_the_interval_holds_the_mean_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(3)
    held = 0
    for seed in range(100):
        interval = bootstrap(generator.random(60).tolist(), resamples=400, seed=seed)
        held += interval.low <= 0.5 <= interval.high
    assert 86 <= held <= 100


def test_a_paired_difference_sees_what_two_intervals_hide() -> None:
    hard = np.random.default_rng(0).random(200)
    difference = paired_difference((hard + 0.02).tolist(), hard.tolist())
    assert difference.low == pytest.approx(0.02)
    assert bootstrap((hard + 0.02).tolist()).low < bootstrap(hard.tolist()).high
    with pytest.raises(ConfigError, match="got 1 and 2"):
        paired_difference([1.0], [1.0, 2.0])
    with pytest.raises(ConfigError, match="got 0"):
        bootstrap([])


def test_calibration_separates_what_can_be_separated_in_the_middle_of_the_gap() -> None:
    found = calibrate([3.0, 4.0, 5.0], [-1.0, 0.0, 1.0])
    assert (found.threshold, found.balanced_accuracy) == (2.0, 1.0)
    mixed = calibrate([0.0, 2.0, 3.0], [-1.0, 1.0, -2.0])
    assert mixed.balanced_accuracy == pytest.approx(5 / 6)
    assert evaluate(10.0, [1.0], [1.0]).abstained == 1
    with pytest.raises(ConfigError, match="0 answerable, 1 not"):
        calibrate([], [1.0])


def test_squad_files_become_passages_and_questions_and_samples_are_disjoint(tmp_path: Path) -> None:
    qas = [{"question": f" q{n}? ", "answers": [{"text": "x"}, {"text": "x"}]} for n in range(10)]
    data = {"data": [{"paragraphs": [{"context": "A", "qas": qas[:4]}, {"context": "B", "qas": qas[4:]}]}]}
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(data))
    task = load_squad(path)
    assert task.passages == ("A", "B")
    assert [(q.text, q.gold, q.answers) for q in task.questions][4] == ("q4?", 1, ("x",))
    first, second = task.sample(4, seed=1), task.sample(4, seed=1, skip=4)
    assert not set(first) & set(second)
    assert task.sample(2, seed=1) == first[:2]
    path.write_text("[1]")
    with pytest.raises(DocumentError, match=r"squad\.json is not a SQuAD"):
        load_squad(path)


def test_the_cache_computes_once_and_heals_damage(tmp_path: Path) -> None:
    cache = StageCache(tmp_path)
    calls: list[list[int]] = []

    def compute(missing: list[int]) -> np.ndarray:
        calls.append(missing)
        return np.array(missing, dtype=np.float32)

    assert cache.get_many("s", ["a", "b"], compute).tolist() == [0, 1]
    assert cache.get_many("s", ["b", "c", "a"], compute).tolist() == [1, 1, 0]
    assert calls == [[0, 1], [1]]
    for file in tmp_path.rglob("*.npy"):
        file.write_bytes(b"broken")
    assert cache.get("s", "a", lambda: np.array(5.0)) == 5
    assert StageCache(tmp_path).get("s", "a", lambda: np.array(6.0)) == 5
    assert not list(tmp_path.rglob("*.partial"))
