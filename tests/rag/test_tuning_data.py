"""Data to fine-tune the generator on: which passages each kind holds, and that training reads the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mainspring.cli.rag import rag
from mainspring.errors import ConfigError, DocumentError
from mainspring.rag.generation.tuning_data import CONTEXT_KINDS, tuning_rows
from mainspring.rag.search.questions import TuneQuestion
from mainspring.rl.sample_files import TokenRules, read_samples
from rag.test_index import open_index, write

DOCUMENTS = {
    f"f{n}": f"The {name} likes food number {n}." for n, name in enumerate(("fox", "owl", "elk", "ant"))
}
QUESTIONS = [
    TuneQuestion(f"What does the {text.split()[1]} like?", (text,), f"{name}.md")
    for name, text in DOCUMENTS.items()
]


def test_each_kind_holds_the_relevant_passage_a_random_one_or_both(tmp_path: Path) -> None:
    index = open_index(tmp_path / "index")
    index.update(write(tmp_path / "docs", **DOCUMENTS))
    chunks = list(index.store.scan())
    expected = {"dg": (1, 1), "dr": (0, 1), "dgr": (1, 2), "dgg": (2, 2)}
    for kind in CONTEXT_KINDS:
        rows = tuning_rows(QUESTIONS, chunks, kind)
        assert [row.answer for row in rows] == [q.evidence[0] for q in QUESTIONS]
        for row, question in zip(rows, QUESTIONS, strict=True):
            found = (row.prompt.count(question.evidence[0]), row.prompt.count("<passage"))
            assert found == expected[kind]
            assert question.text in row.prompt
    orders = {
        row.prompt.index(q.evidence[0]) < row.prompt.index('number="2"')
        for seed in range(8)
        for row, q in zip(tuning_rows(QUESTIONS, chunks, "dgr", seed), QUESTIONS, strict=True)
    }
    assert orders == {True, False}
    assert tuning_rows(QUESTIONS, chunks, "dgr", 3) == tuning_rows(QUESTIONS, chunks, "dgr", 3)
    assert tuning_rows([TuneQuestion("x?", ("nowhere",))], chunks, "dg") == []
    with pytest.raises(DocumentError, match="no other one"):
        tuning_rows(QUESTIONS[:1], [c for c in chunks if c.file == "f0.md"], "dr")
    with pytest.raises(ConfigError, match="dg, dr, dgr, dgg"):
        tuning_rows(QUESTIONS, chunks, "gold")


def test_the_command_writes_what_fine_tuning_reads(tmp_path: Path) -> None:
    folder = write(tmp_path / "docs", **DOCUMENTS)
    index = ["--index", str(tmp_path / "index")]
    runner = CliRunner()
    assert runner.invoke(rag, ["index", str(folder), *index]).exit_code == 0
    asked, out = tmp_path / "q.jsonl", tmp_path / "data.jsonl"
    rows = [{"question": q.text, "evidence": q.evidence[0], "file": q.file} for q in QUESTIONS]
    asked.write_text("\n".join(map(json.dumps, rows)))
    ran = runner.invoke(
        rag, ["tuning-data", "--questions", str(asked), "--out", str(out), "--kind", "dgr", *index]
    )
    assert ran.exit_code == 0, ran.output
    assert "4 samples" in ran.output
    samples = read_samples(out, TokenRules(encode=lambda text: list(text.encode()), end=0))
    assert len(samples) == 4
