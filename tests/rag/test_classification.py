"""Telling questions that need the documents from those that do not: the fit, the examples, the file, the pipeline."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from mainspring.cli.rag import rag
from mainspring.errors import ConfigError, EmbeddingModelChangedError, StoreError
from mainspring.rag.classification.classifier import FILE, QueryClassifier, _logistic, train
from mainspring.rag.classification.examples import Examples, make_examples
from mainspring.rag.classification.testing import evaluate_classifier
from mainspring.rag.embedding.embedder import Embedder
from mainspring.rag.index import DocumentIndex
from mainspring.rag.pipeline import Answer, Parts, Pipeline
from mainspring.rag.retrieval.lexical import LexicalIndex
from mainspring.rag.strategy import AnswerStep, RetrieveStep, Strategy
from rag.fakes import OverlapReranker, ScriptedModel, WordEmbedder
from rag.test_index import open_index, write

DOCS = Path(__file__).parents[2] / "docs"
CLASSIFYING = Strategy(retrieve=RetrieveStep(classify=True), answer=AnswerStep(abstain_below=-1.0))
# People's words, not made by a template.
NEEDING = (
    "Which stores can hold the vectors?",
    "What happens to a file that cannot be read?",
    "How large is the window of the embedding model?",
    "Does indexing start over after it was killed?",
    "Can I use Milvus instead of LanceDB?",
    "Why was the threshold for abstaining chosen like that?",
    "What does the reranker do with long passages?",
    "Which file formats are supported?",
    "Is the order of passages in the prompt configurable?",
    "How are citations attached to sentences?",
    "What is the stand-in for TILDEv2?",
    "How fast is the search in a hundred thousand chunks?",
)
FREE = (
    "What's 12 squared?",
    "Could you add up 4, 9 and 31 for me?",
    "Solve the quadratic x^2 - 5x + 6 = 0",
    "Write a bash one-liner that deletes empty directories",
    "Show me quicksort in Haskell",
    "hey, how is it going",
    "Tell me something funny",
    "Write a haiku about rain",
    "Translate good night into Portuguese",
    "thanks a lot!",
)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> DocumentIndex:
    base = tmp_path_factory.mktemp("classification")
    facts = "\n\n".join(f"The gearwheel number {n} turns the spindle of the old clock." for n in range(80))
    opened = open_index(base / "index", embedder=WordEmbedder())
    opened.update(write(base / "docs", clock=facts))
    return opened


def test_the_fit_is_the_minimum_of_the_weighted_loss() -> None:
    generator = np.random.default_rng(0)
    ones, zeros = generator.normal(0.3, 1, (40, 6)), generator.normal(-0.3, 1, (200, 6))

    def loss(w: np.ndarray, b: float) -> float:
        terms = [np.logaddexp(0, -(ones @ w + b)).mean(), np.logaddexp(0, zeros @ w + b).mean()]
        return float(np.mean(terms) + 0.5 * 0.1 / 240 * w @ w)

    weights, bias = _logistic(ones, zeros)
    for _ in range(200):
        step = generator.normal(0, 0.01, 7)
        assert loss(weights + step[:6], bias + step[6]) > loss(weights, bias)


def test_examples_for_testing_are_not_those_for_training(index: DocumentIndex) -> None:
    train_, test = make_examples(index.store.scan(), 40, seed=1)
    assert (len(train_.needing), len(train_.free), len(test.needing), len(test.free)) == (40, 40, 10, 10)
    assert not set(train_.free) & set(test.free)
    assert make_examples(index.store.scan(), 40, seed=1) == (train_, test)
    assert make_examples(index.store.scan(), 40, seed=2) != (train_, test)


def trained(index: DocumentIndex) -> tuple[QueryClassifier, Examples]:
    train_, test = make_examples(index.store.scan(), 60)
    return train(train_.needing, train_.free, WordEmbedder()), test


def test_a_classifier_survives_its_file_and_a_wrong_one_is_refused(
    index: DocumentIndex, tmp_path: Path
) -> None:
    embedder = WordEmbedder()
    assert QueryClassifier.load(tmp_path, embedder) is None
    classifier, test = trained(index)
    classifier.save(tmp_path)
    again = QueryClassifier.load(tmp_path, embedder)
    assert again is not None
    vectors = embedder.embed_queries(test.needing)
    np.testing.assert_array_equal(again.probabilities(vectors), classifier.probabilities(vectors))
    with pytest.raises(EmbeddingModelChangedError, match="trained on 'words', the index has 'other'"):
        QueryClassifier.load(tmp_path, WordEmbedder("other"))
    stored = json.loads((tmp_path / FILE).read_text())
    for broken in ("{", "[]", json.dumps({**stored, "format": 9}), json.dumps({**stored, "weights": "x"})):
        (tmp_path / FILE).write_text(broken)
        with pytest.raises(StoreError, match="is damaged"):
            QueryClassifier.load(tmp_path, embedder)
    with pytest.raises(ConfigError, match="got 3 that need the documents"):
        train(["a", "b", "c"], ["d"] * 20, embedder)


def test_precision_and_recall_are_counted_as_defined() -> None:
    weights = np.zeros(64)
    always = QueryClassifier("words", weights, 1.0, 0.5)
    found = evaluate_classifier(always, WordEmbedder(), ["a", "b", "c"], ["d"])
    assert (found.precision, found.recall, found.passed_by) == (0.75, 1.0, 0.0)
    never = dataclasses.replace(always, bias=-1.0)
    found = evaluate_classifier(never, WordEmbedder(), ["a", "b", "c"], ["d"])
    assert (found.precision, found.recall, found.passed_by) == (0.0, 0.0, 1.0)
    with pytest.raises(ConfigError, match="got 0 and 1"):
        evaluate_classifier(always, WordEmbedder(), [], ["d"])


def test_a_pipeline_reads_no_document_for_a_question_that_needs_none(index: DocumentIndex) -> None:
    classifier, _ = trained(index)
    lexical = LexicalIndex.open(index.directory / "bm25", index.store)
    model = ScriptedModel("Fine, thank you.", "It turns the spindle.")
    reranker = OverlapReranker()
    parts = Parts(
        WordEmbedder(), index.store, lexical, reranker, reranker, model=model, classifier=classifier
    )
    pipeline = Pipeline(CLASSIFYING, parts)
    assert pipeline.answer("Hello, how are you?") == Answer("Fine, thank you.", (), (), False)
    assert "passage" not in model.asked[0][-1].content
    answer = pipeline.answer("What does the gearwheel turn, the spindle of the old clock?")
    assert answer.passages
    assert "gearwheel number" in model.asked[1][-1].content
    with pytest.raises(ConfigError, match="run `mainspring rag classify`"):
        Pipeline(CLASSIFYING, dataclasses.replace(parts, classifier=None)).answer("Hello?")


def test_it_tells_peoples_questions_apart_that_it_did_not_make(minilm: Embedder, tmp_path: Path) -> None:
    """The real embedder, trained on one page of this house's documents."""
    opened = open_index(tmp_path / "index", embedder=WordEmbedder(window=200))
    opened.update(write(tmp_path / "docs", rag=(DOCS / "rag.md").read_text()))
    made, _ = make_examples(opened.store.scan(), 120)
    classifier = train(made.needing, made.free, minilm)
    found = evaluate_classifier(classifier, minilm, NEEDING, FREE)
    assert found.recall >= 0.9
    assert found.passed_by >= 0.8


@pytest.mark.slow
def test_the_command_trains_tests_and_keeps_the_classifier(tmp_path: Path) -> None:
    write(tmp_path / "docs", rag=(DOCS / "rag.md").read_text())
    directory = tmp_path / "index"
    questions = tmp_path / "q.jsonl"
    questions.write_text("\n".join(json.dumps({"question": q, "evidence": "x"}) for q in NEEDING))
    runner = CliRunner()
    assert runner.invoke(rag, ["index", str(tmp_path / "docs"), "--index", str(directory)]).exit_code == 0
    ran = runner.invoke(rag, ["classify", "--index", str(directory), "--questions", str(questions)])
    assert ran.exit_code == 0, ran.output
    assert "held-out made queries: precision" in ran.output
    assert "(12 that need the documents" in ran.output
    assert (directory / FILE).is_file()
