"""Tuning by answers, over indexes cut in different ways, and on questions that the model made."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mainspring.cli.rag import rag
from mainspring.errors import ConfigError, DocumentError
from mainspring.rag.assembly import open_variants
from mainspring.rag.evaluation.measures import faithfulness
from mainspring.rag.generation.language_model import Message
from mainspring.rag.generation.reading import ExtractiveReader, GenerativeReader
from mainspring.rag.index import DocumentIndex
from mainspring.rag.pipeline import Parts
from mainspring.rag.retrieval.lexical import LexicalIndex
from mainspring.rag.search.cached_parts import Recorder
from mainspring.rag.search.evaluator import PipelineEvaluator
from mainspring.rag.search.made_questions import make_questions
from mainspring.rag.search.questions import TuneQuestion, load_questions
from mainspring.rag.search.space import Choice, canonical, default_space
from mainspring.rag.search.stage_cache import StageCache
from mainspring.rag.search.variants import VariantEvaluator
from mainspring.rag.strategy import ContextStep, IndexStep, RerankStep, Strategy
from rag.fakes import OverlapReranker, ScriptedModel, WordEmbedder
from rag.test_index import open_index, write

TEXT = "The red fox hunts mice at night. The blue whale eats krill all day. An oak grows slowly in rain."
PLAIN = Strategy(rerank=RerankStep("none"), context=ContextStep(passages=3))


class FirstWords:
    """Answers with the first passage's first words; depends on the order alone. Implements `LanguageModel`."""

    name = "first"

    def __init__(self) -> None:
        self.calls = 0

    def stream(self, messages: Sequence[Message], max_tokens: int) -> Iterator[str]:
        self.calls += 1
        yield messages[-1].content.split("\n")[1]


def evaluator(index: DocumentIndex, cache: Path, model: FirstWords | None = None) -> PipelineEvaluator:
    lexical = LexicalIndex.open(index.directory / "bm25", index.store)
    parts = Parts(WordEmbedder(), index.store, lexical, model=model)
    reader = GenerativeReader(model) if model is not None else ExtractiveReader(OverlapReranker())
    return PipelineEvaluator(parts, Recorder(StageCache(cache)), lambda _: None, lambda _: None, reader)


def test_the_order_of_passages_shows_in_the_quality_of_answers(tmp_path: Path) -> None:
    index = open_index(tmp_path / "index", IndexStep(size=12, overlap=0), WordEmbedder())
    index.update(write(tmp_path / "docs", a=TEXT))
    question = TuneQuestion("What does the blue whale eat?", ("The blue whale eats krill all day.",))
    model = FirstWords()
    evaluate = evaluator(index, tmp_path / "cache", model)
    orders = {
        order: evaluate(dataclasses.replace(PLAIN, context=ContextStep(3, order)), question).quality
        for order in ("forward", "reverse")
    }
    assert orders["forward"] == pytest.approx(1.0)
    assert orders["reverse"] < 0.6
    calls = model.calls
    assert evaluate(dataclasses.replace(PLAIN, context=ContextStep(3, "forward")), question).quality == 1.0
    assert model.calls == calls


def test_the_extractive_reader_answers_with_the_sentence_that_has_the_words() -> None:
    reader = ExtractiveReader(OverlapReranker())
    assert reader.read("What eats krill?", [TEXT], ["a"], 8) == "The blue whale eats krill all day."
    assert reader.read("What eats krill?", [], [], 8) == ""


def test_a_way_of_cutting_is_an_index_of_its_own_made_when_it_is_first_tried(tmp_path: Path) -> None:
    folder = write(tmp_path / "docs", a=TEXT)
    question = TuneQuestion("What does the blue whale eat?", ("krill all day. An oak",))
    opened: list[IndexStep] = []

    def open_one(step: IndexStep) -> PipelineEvaluator:
        opened.append(step)
        index = open_index(tmp_path / f"index{len(opened)}", step, WordEmbedder())
        index.update(folder)
        made = evaluator(index, tmp_path / "cache")
        made._reader = None
        return made

    small, large = IndexStep(size=12, overlap=0), IndexStep(size=40, overlap=0)
    evaluate = VariantEvaluator(small, open_one)
    assert len(list(evaluate.chunks())) == 3
    assert evaluate(dataclasses.replace(PLAIN, index=small), question).quality == 0
    assert opened == [small]
    for _ in range(2):
        assert evaluate(dataclasses.replace(PLAIN, index=large), question).quality == 1
    assert opened == [small, large]


def test_settings_of_cutting_that_have_no_effect_are_one_strategy() -> None:
    for key, value in {"index.big_size": 512, "index.window": 3}.items():
        assert Choice(key, (value,)).applied(Strategy(), value) == canonical(Strategy())
    big = Choice("index.chunking", ("small-to-big",)).applied(Strategy(), "small-to-big")
    assert Choice("index.big_size", (512,)).applied(big, 512) != big
    keys = {choice.key for choice in default_space(with_index=True, with_answers=True).choices}
    assert {"index.chunking", "index.embedder", "context.order", "answer.max_tokens"} <= keys


def test_made_questions_have_their_sentence_as_evidence_and_bad_ones_are_dropped(tmp_path: Path) -> None:
    index = open_index(tmp_path / "index", IndexStep(size=40, overlap=0), WordEmbedder())
    facts = [f"The number {n} animal of the zoo eats {n} kinds of good food." for n in range(6)]
    index.update(write(tmp_path / "docs", a="\n\n".join([*facts, "Too short.", "x = 1; y = {2}"])))
    model = ScriptedModel(
        "No question at all.",
        "Question: Which animal eats kinds of food?\nAnd more",
        "Which animal eats kinds of food?",  # made before
        "The number animal of the zoo eats kinds of good food number?",  # repeats its sentence
        "Unrelated planets orbit stars?",
        "What food do animals of the zoo like?",
    )
    made = make_questions(index.store.scan(), model, OverlapReranker(), 5, seed=1)
    assert [q.text for q in made] == [
        "Which animal eats kinds of food?",
        "What food do animals of the zoo like?",
    ]
    assert all(q.evidence[0] in facts and q.file == "a.md" for q in made)
    empty = open_index(tmp_path / "other", embedder=WordEmbedder())
    empty.update(write(tmp_path / "more", b="Nothing here."))
    with pytest.raises(DocumentError, match="8 to 40 words"):
        make_questions(empty.store.scan(), ScriptedModel(), OverlapReranker(), 5)


def test_faithfulness_is_the_share_of_content_that_was_read() -> None:
    read = ["The fox hunts mice.", "Oaks grow."]
    assert faithfulness("A fox is hunting the mouse and oaks", read) == pytest.approx(3 / 4)
    assert faithfulness("", read) == faithfulness("it is", read) == 1.0
    assert faithfulness("Quantum chips", read) == 0.0


def test_tune_without_questions_and_without_a_model_says_what_to_give(tmp_path: Path) -> None:
    folder = write(tmp_path / "docs", a=TEXT)
    index = ["--index", str(tmp_path / "index")]
    assert CliRunner().invoke(rag, ["index", str(folder), *index]).exit_code == 0
    run = CliRunner().invoke(rag, ["tune", "--latency-p95", "1s", *index])
    assert isinstance(run.exception, ConfigError)
    assert "--questions FILE, or --model" in str(run.exception)


@pytest.mark.slow
def test_the_command_makes_questions_and_tunes_cutting_with_the_real_models(tmp_path: Path) -> None:
    docs = Path(__file__).parents[2] / "docs"
    folder = tmp_path / "docs"
    folder.mkdir()
    for name in ("rag.md", "parallel.md", "rl.md", "serving.md"):
        (folder / name).write_text((docs / name).read_text())
    index = ["--index", str(tmp_path / "index")]
    runner = CliRunner()
    assert runner.invoke(rag, ["index", str(folder), *index]).exit_code == 0
    space = tmp_path / "space.toml"
    space.write_text('[index]\nsize = [100, 200]\n[rerank]\nmethod = ["none"]\n')
    options = ["--latency-p95", "20s", "--model", "smollm2", "--make", "60", "--budget", "120"]
    outputs = ["--recipe", str(tmp_path / "s.toml"), "--report", str(tmp_path / "r.html")]
    command = ["tune", *options, "--folder", str(folder), "--space", str(space), *outputs, *index]
    ran = runner.invoke(rag, command)
    assert ran.exit_code == 0, ran.output
    made = load_questions(tmp_path / "index" / "made_questions.jsonl")
    assert len(made) >= 40
    assert all(json.dumps(q.text).endswith('?"') for q in made)
    assert (
        "index.size" in (tmp_path / "r.html").read_text()
        or "size = [100, 200]" in (tmp_path / "r.html").read_text()
    )


def test_variants_of_the_assembly_leave_the_present_index_where_it_is(tmp_path: Path) -> None:
    folder = write(tmp_path / "docs", a=TEXT)
    present = Strategy(rerank=RerankStep("none"))
    evaluate = open_variants(tmp_path / "index", folder, present)
    assert len(list(evaluate.chunks())) == 1
    question = TuneQuestion("What does the blue whale eat?", ("eats krill",))
    other = dataclasses.replace(present, index=IndexStep(size=20, overlap=0))
    assert evaluate(other, question).quality == 1
    assert len(list((tmp_path / "index" / "tune" / "indexes").iterdir())) == 1
    assert len(list(evaluate.chunks())) == 1
