"""Tuning over a real index: the pipeline over kept parts, what is shared and what never is, the command."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from typer.testing import CliRunner

from mainspring.cli.rag import rag
from mainspring.errors import ConfigError
from mainspring.rag.embedding.embedder import Vectors
from mainspring.rag.generation.extraction import Bm25Extraction
from mainspring.rag.index import DocumentIndex
from mainspring.rag.pipeline import Parts, Pipeline
from mainspring.rag.retrieval.lexical import LexicalIndex
from mainspring.rag.search.cached_parts import Recorder
from mainspring.rag.search.evaluator import PipelineEvaluator
from mainspring.rag.search.questions import TuneQuestion, answerable
from mainspring.rag.search.space import Choice, Space
from mainspring.rag.search.stage_cache import StageCache
from mainspring.rag.search.tune import TuneSettings, tune
from mainspring.rag.stores.lance import LanceStore
from mainspring.rag.strategy import ContextStep, RerankStep, RetrieveStep, Strategy, load_strategy
from rag.fakes import OverlapReranker, WordEmbedder
from rag.test_index import open_index, write

ANIMALS = ("fox", "whale", "otter", "eagle", "viper", "moose", "heron", "lynx", "crab", "tapir")
FACTS = ("eats {n} kinds of food", "lives for {n} years", "weighs {n} stone", "sleeps {n} hours")
QUESTIONS = tuple(
    TuneQuestion(
        f"How is it that the {animal} {fact.split()[0]}", (fact.format(n=10 * a + f),), f"{animal}.md"
    )
    for a, animal in enumerate(ANIMALS)
    for f, fact in enumerate(FACTS)
)
SPACE = Space(
    (
        Choice("retrieve.method", ("hybrid", "bm25", "dense")),
        Choice("rerank.method", ("none", "cross-encoder")),
        Choice("rerank.depth", (5, 20)),
        Choice("context.passages", (1, 3)),
        Choice("context.summary", ("none", "extractive-bm25")),
    )
)


class Clock:
    """Time that passes only where a part says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class SlowEmbedder(WordEmbedder):
    """A query takes 20 ms."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def embed_queries(self, texts: Sequence[str]) -> Vectors:
        self._clock.now += 0.02 * len(texts)
        return super().embed_queries(texts)


class SlowReranker(OverlapReranker):
    """A passage takes 10 ms."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.calls = 0

    def scores(self, query: str, passages: Sequence[str]) -> npt.NDArray[np.float32]:
        self.calls += 1
        self._clock.now += 0.01 * len(passages)
        return super().scores(query, passages)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> DocumentIndex:
    base = tmp_path_factory.mktemp("tune")
    texts = {
        animal: f"# The {animal}\n" + "\n\n".join(
            f"The {animal} {fact.format(n=10 * a + f)}." for f, fact in enumerate(FACTS)
        )
        for a, animal in enumerate(ANIMALS)
    }  # fmt: skip
    opened = open_index(base / "index", embedder=WordEmbedder())
    opened.update(write(base / "docs", **texts))
    return opened


class World:
    """An evaluator over fakes whose time is known."""

    def __init__(self, index: DocumentIndex, cache: Path) -> None:
        self.clock = Clock()
        self.reranker = SlowReranker(self.clock)
        lexical = LexicalIndex.open(index.directory / "bm25", index.store)
        self.parts = Parts(SlowEmbedder(self.clock), index.store, lexical)
        self.evaluate = PipelineEvaluator(
            self.parts,
            Recorder(StageCache(cache), self.clock),
            lambda _: self.reranker,
            lambda _: Bm25Extraction(),
        )


PLAIN = Strategy(rerank=RerankStep("none"))


def test_kept_results_cost_no_work_and_count_their_time(index: DocumentIndex, tmp_path: Path) -> None:
    world = World(index, tmp_path)
    strategy = Strategy(rerank=RerankStep(depth=7))
    first = [world.evaluate(strategy, q) for q in QUESTIONS[:6]]
    assert first[0].seconds == pytest.approx(0.02 + 7 * 0.01)
    calls, now = world.reranker.calls, world.clock.now
    assert [world.evaluate(strategy, q) for q in QUESTIONS[:6]] == first
    assert (world.reranker.calls, world.clock.now) == (calls, now)
    again = World(index, tmp_path)
    assert [again.evaluate(strategy, q) for q in QUESTIONS[:6]] == first
    assert again.reranker.calls == 1  # the warm-up of a new process


def test_strategies_share_what_they_have_in_common_and_nothing_else(
    index: DocumentIndex, tmp_path: Path
) -> None:
    """Every strategy over one cache, in a mixed order, gives what the pipeline without a cache gives."""
    world = World(index, tmp_path)
    strategies = list(dict.fromkeys(SPACE.at(i, Strategy()) for i in range(SPACE.size)))
    for question in QUESTIONS[:3]:
        for strategy in strategies:
            outcome = world.evaluate(strategy, question)
            parts = dataclasses.replace(world.parts, reranker=OverlapReranker(), summariser=Bm25Extraction())
            pipeline = Pipeline(strategy, parts)
            found = pipeline.search(question.text)
            texts, passages = pipeline.context(question.text, found)
            held = {p.chunk.id for t, p in zip(texts, passages, strict=True) if question.evidence[0] in t}
            ranks = [n for n, p in enumerate(found, 1) if p.chunk.id in held]
            assert outcome.quality == (1 / ranks[0] if ranks else 0)
            reads = strategy.rerank.method != "none"
            assert (outcome.seconds > 0.03) == reads


def test_a_deeper_reranking_reads_only_what_is_new_and_counts_all(
    index: DocumentIndex, tmp_path: Path
) -> None:
    world = World(index, tmp_path)
    shallow, deep = (Strategy(rerank=RerankStep(depth=depth)) for depth in (5, 12))
    for question in QUESTIONS[:4]:
        world.evaluate(shallow, question)
    before = world.clock.now
    outcomes = [world.evaluate(deep, question) for question in QUESTIONS[:4]]
    assert world.clock.now - before == pytest.approx(4 * (12 - 5) * 0.01)
    assert [o.seconds for o in outcomes] == pytest.approx([0.02 + 12 * 0.01] * 4)
    alone = World(index, tmp_path / "alone")
    assert [o.quality for o in outcomes] == [alone.evaluate(deep, q).quality for q in QUESTIONS[:4]]


def test_other_vectors_of_the_same_passages_do_not_get_the_kept_results(
    index: DocumentIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Late chunking: the same passages and model, other vectors."""
    world = World(index, tmp_path)
    dense = Strategy(retrieve=RetrieveStep(method="dense"), rerank=RerankStep("none"))
    question = QUESTIONS[5]
    assert world.evaluate(dense, question).quality > 0

    store = LanceStore(index.directory / "store", WordEmbedder.dimension)
    monkeypatch.setattr(store, "search", lambda vector, k, where=(): [])
    parts = dataclasses.replace(world.parts, store=store)
    recorder = Recorder(StageCache(tmp_path), world.clock)
    made = [
        PipelineEvaluator(parts, recorder, lambda _: None, lambda _: None, vectors=v) for v in ("", ", late")
    ]
    assert [evaluate(dense, question).quality > 0 for evaluate in made] == [True, False]


def test_another_corpus_does_not_get_the_kept_results(index: DocumentIndex, tmp_path: Path) -> None:
    question = QUESTIONS[5]
    assert World(index, tmp_path / "cache").evaluate(PLAIN, question).quality > 0
    other = open_index(tmp_path / "index", embedder=WordEmbedder())
    other.update(write(tmp_path / "docs", other="Nothing of the kind lives here."))
    assert World(other, tmp_path / "cache").evaluate(PLAIN, question).quality == 0
    there = dataclasses.replace(question, evidence=("Nothing of the kind",), file="other.md")
    assert World(other, tmp_path / "cache").evaluate(PLAIN, there).quality == 1


def test_a_summary_that_loses_the_evidence_loses_the_quality(index: DocumentIndex, tmp_path: Path) -> None:
    world = World(index, tmp_path)
    whole = Strategy(rerank=RerankStep("none"), context=ContextStep(passages=3))
    short = dataclasses.replace(whole, context=ContextStep(3, summary="extractive-bm25", ratio=0.01))
    pairs = zip(QUESTIONS[::4], QUESTIONS[1::4], strict=True)
    misleading = [dataclasses.replace(asked, evidence=meant.evidence) for asked, meant in pairs]
    outcomes = [(world.evaluate(whole, q), world.evaluate(short, q)) for q in misleading]
    assert all(s.quality <= w.quality for w, s in outcomes)
    assert sum(s.quality for _, s in outcomes) < sum(w.quality for w, _ in outcomes)


def test_a_slow_reranker_is_left_out_where_the_latency_forbids_it(
    index: DocumentIndex, tmp_path: Path
) -> None:
    world = World(index, tmp_path)
    result = tune(world.evaluate, QUESTIONS, SPACE, Strategy(), TuneSettings(0.05, 120))
    assert result.held["present"].figures.p95 == pytest.approx(0.02 + 20 * 0.01)
    assert result.recommended.rerank.method == "none"
    assert "the present strategy's p95 is 220 ms" in result.recommendation.reason


def test_questions_whose_evidence_is_nowhere_are_left_out(index: DocumentIndex) -> None:
    strange = TuneQuestion("What does the unicorn eat?", ("rainbows",))
    misplaced = dataclasses.replace(QUESTIONS[0], file="whale.md")
    assert answerable([QUESTIONS[0], strange, misplaced], index.store.scan()) == (
        (QUESTIONS[0],),
        (strange, misplaced),
    )


@pytest.mark.parametrize("text", ["800", "0ms", "-1s", "fast", "1 min"])
def test_a_latency_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    run = CliRunner().invoke(rag, ["tune", "--questions", str(tmp_path / "q"), "--latency-p95", text])
    assert isinstance(run.exception, ConfigError)
    assert "write 800ms or 1.5s" in str(run.exception)


@pytest.mark.slow
def test_the_command_tunes_an_index_with_the_real_models(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    for a, animal in enumerate(ANIMALS):
        facts = "\n\n".join(f"The {animal} {fact.format(n=10 * a + f)}." for f, fact in enumerate(FACTS))
        (folder / f"{animal}.md").write_text(f"# The {animal}\n\n{facts}\n")
    index = ["--index", str(tmp_path / "index")]
    runner = CliRunner()
    assert runner.invoke(rag, ["index", str(folder), *index]).exit_code == 0
    questions = tmp_path / "q.jsonl"
    rows = [{"question": q.text, "evidence": q.evidence[0], "file": q.file} for q in QUESTIONS]
    questions.write_text("\n".join(map(json.dumps, rows)))
    recipe, report = tmp_path / "strategy.toml", tmp_path / "tune.html"
    command = ["tune", "--questions", str(questions), "--latency-p95", "20s", "--budget", "150", *index]
    ran = runner.invoke(rag, [*command, "--recipe", str(recipe), "--report", str(report)])
    assert ran.exit_code == 0, ran.output
    assert "beam minus greedy" in ran.output
    assert load_strategy(recipe).index == Strategy().index
    assert report.read_text().count("<svg") == 3
    found = runner.invoke(rag, ["search", QUESTIONS[3].text, "--strategy", str(recipe), *index])
    assert "fox.md" in found.output
