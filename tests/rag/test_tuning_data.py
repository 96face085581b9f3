"""Data to fine-tune the generator on, and the command that tunes: contexts, prompts, resuming, what is measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mainspring.cli.rag import rag
from mainspring.engine.llm import LLM
from mainspring.engine.sampling_params import SamplingParams
from mainspring.errors import ConfigError, DocumentError, MainspringError
from mainspring.rag.generation.language_model import (
    FREQUENCY_PENALTY,
    InProcessModel,
    Message,
    complete,
    complete_each,
)
from mainspring.rag.generation.robustness import costs_of_noise, score, table
from mainspring.rag.generation.tuning_data import (
    CONTEXT_KINDS,
    TuningRow,
    load_rows,
    save_rows,
    tuning_rows,
)
from mainspring.rag.search.questions import TuneQuestion
from rag.test_index import open_index, write
from support.serving import write_tiny_model

DOCUMENTS = {
    f"f{n}": f"The {name} likes food number {n}." for n, name in enumerate(("fox", "owl", "elk", "ant"))
}
QUESTIONS = [
    TuneQuestion(f"What does the {text.split()[1]} like?", (text,), f"{name}.md")
    for name, text in DOCUMENTS.items()
]


def text_of(row: TuningRow) -> str:
    return "\n".join(message.content for message in row.messages)


def test_each_kind_holds_the_relevant_passage_a_random_one_or_both(tmp_path: Path) -> None:
    index = open_index(tmp_path / "index")
    index.update(write(tmp_path / "docs", **DOCUMENTS))
    chunks = list(index.store.scan())
    expected = {"dg": (1, 1), "dr": (0, 1), "dgr": (1, 2), "dgg": (2, 2)}
    for kind in CONTEXT_KINDS:
        rows = tuning_rows(QUESTIONS, chunks, kind)
        assert [row.answers for row in rows] == [q.evidence for q in QUESTIONS]
        for row, question in zip(rows, QUESTIONS, strict=True):
            text = text_of(row)
            assert (text.count(question.evidence[0]), text.count("<passage ")) == expected[kind]
            assert question.text in text
    orders = {
        text_of(row).index(q.evidence[0]) < text_of(row).index('number="2"')
        for seed in range(8)
        for row, q in zip(tuning_rows(QUESTIONS, chunks, "dgr", seed), QUESTIONS, strict=True)
    }
    assert orders == {True, False}
    mixed = tuning_rows(QUESTIONS, chunks, "dgr", 3)
    assert mixed == tuning_rows(QUESTIONS, chunks, "dgr", 3)
    assert mixed[2:] == tuning_rows(QUESTIONS[2:], chunks, "dgr", 3)  # whatever else is asked
    assert tuning_rows([TuneQuestion("x?", ("nowhere",))], chunks, "dg") == []
    with pytest.raises(DocumentError, match="no other one"):
        tuning_rows(QUESTIONS[:1], [c for c in chunks if c.file == "f0.md"], "dr")
    with pytest.raises(ConfigError, match="dg, dr, dgr, dgg"):
        tuning_rows(QUESTIONS, chunks, "gold")


def test_samples_survive_their_file_and_a_bad_line_is_named(tmp_path: Path) -> None:
    rows = [TuningRow((Message("system", "Be brief."), Message("user", "ä?\n")), ("yes", "no"))]
    save_rows(tmp_path / "rows.jsonl", rows)
    assert load_rows(tmp_path / "rows.jsonl") == rows
    (tmp_path / "bad.jsonl").write_text(f'{(tmp_path / "rows.jsonl").read_text()}{{"messages": 1}}\n')
    with pytest.raises(DocumentError, match="line 2 is not a sample"):
        load_rows(tmp_path / "bad.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DocumentError, match="no samples"):
        load_rows(tmp_path / "empty.jsonl")
    with pytest.raises(DocumentError, match="cannot be read"):
        load_rows(tmp_path / "absent.jsonl")


def test_answers_are_scored_by_words_by_substring_and_whole() -> None:
    rows = [TuningRow((), ("The red fox",)), TuningRow((), ("owl", "the grey owl"))]
    found = score(["red fox!", "It was the grey owl."], rows)
    assert found.exact == (1.0, 0.0)
    assert found.contained == (1.0, 1.0)
    assert found.f1 == pytest.approx((1.0, 2 * 2 / (4 + 2)))
    worse = score(["a whale", "owl"], rows)
    both = {"first": {"dg": found, "dgr": worse}, "second": {"dg": worse, "dgr": found}}
    lines = table(both)
    assert "| second | relevant | 0.500" in lines[4]
    assert lines[4].count("[") == 4  # three intervals and that of the difference
    assert lines[2].endswith("|  |")
    assert costs_of_noise(both)[2].startswith("| first | -0.500 [")
    assert "| -0.3" in costs_of_noise(both)[2]
    with pytest.raises(ConfigError, match="1 answers to 2"):
        score(["x"], rows)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def test_answers_written_side_by_side_are_those_written_alone(tiny: Path) -> None:
    model = InProcessModel(str(tiny), at_once=3)
    asked = [[Message("user", "x" * n)] for n in (1, 30, 7, 12)]
    together = complete_each(model, asked, 12)
    assert together == [complete(model, messages, 12) for messages in asked]
    assert len(set(together)) > 1


def test_a_model_s_own_repetition_penalty_goes_before_ours(tiny: Path, tmp_path: Path) -> None:
    asked = [[Message("user", f"{n} fox")] for n in range(6)]

    def answers(directory: Path, **given: float) -> list[str]:
        return InProcessModel(str(directory), at_once=6, **given).complete_each(asked, 24)

    llm = LLM(tiny, max_num_seqs=6)
    ours = SamplingParams(temperature=0, frequency_penalty=FREQUENCY_PENALTY, max_tokens=24)
    outputs = llm.chat([[{"role": m.role, "content": m.content} for m in turns] for turns in asked], ours)
    plain = [output.outputs[0].text.strip() for output in outputs]
    assert answers(tiny) == plain == InProcessModel(llm).complete_each(asked, 24)
    copy = tmp_path / "model"
    copy.mkdir()
    for path in tiny.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "generation_config.json").write_text("{}")
    assert answers(copy) == plain
    (copy / "generation_config.json").write_text('{"repetition_penalty": 1.3}')
    assert answers(copy) == answers(tiny, repetition_penalty=1.3) != plain
    free = InProcessModel(str(copy), at_once=6).complete_each(asked, 24, may_repeat=True)
    assert free == plain, "its own penalty is set aside"
    (copy / "generation_config.json").write_text('{"repetition_penalty": [}')
    with pytest.raises(MainspringError, match="generation_config"):
        answers(copy)


ANIMALS = 44


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `tuning-data` makes of an index and questions about it."""
    base = tmp_path_factory.mktemp("tuning")
    documents = {f"f{n}": f"The animal {n} likes food number {n}." for n in range(ANIMALS)}
    index = ["--index", str(base / "index")]
    runner = CliRunner()
    assert runner.invoke(rag, ["index", str(write(base / "docs", **documents)), *index]).exit_code == 0
    asked = base / "q.jsonl"
    rows = [
        {"question": f"What does the animal {n} like?", "evidence": documents[f"f{n}"], "file": f"f{n}.md"}
        for n in range(ANIMALS)
    ]
    rows.append({"question": "Why?", "evidence": "nowhere"})
    asked.write_text("\n".join(map(json.dumps, rows)))
    ran = runner.invoke(
        rag,
        ["tuning-data", "--questions", str(asked), "--out", str(base / "data"), "--held-out", "0.5", *index],
    )
    assert ran.exit_code == 0, ran.output
    assert "22 samples to learn and 22 to test with" in ran.output
    assert "1 questions have their evidence in no passage" in ran.output
    return base / "data"


def test_no_question_is_both_learnt_and_tested_with(data: Path) -> None:
    for kind in CONTEXT_KINDS:
        sides = [
            {row.answers for row in load_rows(data / f"{side}.{kind}.jsonl")}
            for side in ("train", "held_out")
        ]
        assert not sides[0] & sides[1]
        assert [len(side) for side in sides] == [22, 22]


def test_a_generator_is_tuned_measured_and_found_again(
    data: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = CliRunner()
    command = ["fine-tune", str(data), "--kind", "dgr", "--model", str(tiny), "--batch", "11", "--limit", "3"]
    ran = runner.invoke(rag, command)
    assert ran.exit_code == 0, ran.output
    report = (data / "report.md").read_text()
    for model in ("untrained", "untrained, free to repeat", "dgr"):
        for context in ("relevant", "relevant and random", "random"):
            assert f"| {model} | {context} | 0." in report
    assert "3 held-out questions" in report
    [line, *others] = (data / "dgr" / "samples.jsonl").read_text().splitlines()
    assert len(others) == 21
    first = load_rows(data / "train.dgr.jsonl")[0]
    llm = LLM(tiny, max_num_seqs=1)
    assert llm.tokenizer is not None
    turns = [{"role": m.role, "content": m.content} for m in first.messages]
    assert json.loads(line) == {
        "prompt": llm.tokenizer.apply_chat_template(turns),
        "answer": first.answers[0],
    }
    tuned = data / "dgr" / "latest"
    assert tuned.resolve().name == "step-00000004"  # two passes of two steps
    assert json.loads((tuned / "generation_config.json").read_text())["repetition_penalty"] == 1.0
    assert InProcessModel(str(tuned)).complete_each([first.messages], 4)

    monkeypatch.setattr("mainspring.rl.run.RlRun.run", lambda self: pytest.fail("trained again"))
    monkeypatch.setattr(InProcessModel, "complete_each", lambda *_: pytest.fail("asked again"))
    again = runner.invoke(rag, command)
    assert again.exit_code == 0, again.output
    assert (data / "report.md").read_text() == report
    other = runner.invoke(rag, [*command, "--epochs", "3"])
    assert isinstance(other.exception, ConfigError)
    assert "--restart" in str(other.exception)


def test_what_cannot_be_tuned_is_refused(data: Path, tmp_path: Path) -> None:
    for arguments, said in (
        ([str(data), "--kind", "gold"], "dg, dr, dgr, dgg"),
        ([str(data), "--device", "tpu"], "must be one of cpu, cuda"),
        ([str(tmp_path)], "cannot be read"),
    ):
        ran = CliRunner().invoke(rag, ["fine-tune", *arguments])
        assert isinstance(ran.exception, MainspringError)
        assert said in str(ran.exception)
