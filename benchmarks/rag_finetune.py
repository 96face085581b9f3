"""What fine-tuning the generator does to its robustness (arXiv 2407.01219, section 3.7): the data for it.

    python benchmarks/rag_finetune.py --folder /usr/share/doc/python3.11/html --squad $SQUAD --out tuned
    mainspring rag fine-tune tuned --kind dg --kind dr --kind dgr --kind dgg --test tuned/squad [--device cuda]

The questions to learn from are made from the folder's documents by the model, as `rag tuning-data` makes them, but no
index is needed: their files are split, so that no passage stands on both sides. SQuAD's questions, whose accepted
answers are a few words that people marked, are for testing only: a sentence that holds one contains the answer.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from mainspring.errors import DocumentError
from mainspring.formats.files import write_file
from mainspring.rag.chunking.chunk import Chunk, TokenCounter, make_chunk
from mainspring.rag.documents.document import Extract, document
from mainspring.rag.documents.reading import find_files, read_bytes, read_document
from mainspring.rag.embedding.models import load_embedder
from mainspring.rag.evaluation.squad import load_squad
from mainspring.rag.generation.language_model import InProcessModel
from mainspring.rag.generation.robustness import CONTEXTS
from mainspring.rag.generation.tuning_data import CONTEXT_KINDS, save_rows, tuning_rows
from mainspring.rag.ranking.cross_encoder import CrossEncoder
from mainspring.rag.search.made_questions import make_questions
from mainspring.rag.search.questions import TuneQuestion, load_questions
from mainspring.rag.strategy import IndexStep

SEED = 20261126


def chunks_of(folder: Path, counter: TokenCounter) -> list[Chunk]:
    """The passages that an index of the folder would hold."""
    chunker = IndexStep().chunker()
    found: list[Chunk] = []
    for file in find_files(folder):
        try:
            found += chunker.split(read_document(file, read_bytes(file)), counter)
        except DocumentError as error:
            print(f"left out: {error}")
    return found


def made(chunks: list[Chunk], path: Path, count: int, model: str, at_once: int) -> tuple[TuneQuestion, ...]:
    """Questions by the model, kept in a file."""
    if not path.is_file():

        def heard(done: int, total: int) -> None:
            if done % 50 == 0:
                print(f"{done} of {total}", flush=True)

        writer = InProcessModel(model, at_once=at_once, repetition_penalty=1.0)
        questions = make_questions(chunks, writer, CrossEncoder(threads=1), count, SEED, heard)
        rows = [{"question": q.text, "evidence": list(q.evidence), "file": q.file} for q in questions]
        write_file(path.absolute(), "".join(json.dumps(row) + "\n" for row in rows).encode())
    return load_questions(path)


def by_files(
    questions: tuple[TuneQuestion, ...], held_out: int
) -> tuple[list[TuneQuestion], list[TuneQuestion]]:
    """(to learn from, at least `held_out` to test with), no file on both sides."""
    files = sorted({str(q.file) for q in questions})
    random.Random(SEED).shuffle(files)
    held: set[str] = set()
    while sum(q.file in held for q in questions) < held_out:
        held.add(files.pop())
    return [q for q in questions if q.file not in held], [q for q in questions if q.file in held]


def squad_rows(path: Path, out: Path, count: int, counter: TokenCounter) -> int:
    """Writes held_out files of `count` questions: each paragraph is a passage, the accepted answers are people's."""
    task = load_squad(path)
    chunks = []
    for number, text in enumerate(task.passages):
        whole = document(f"paragraph {number}", text.encode(), Extract(text))
        chunks.append(make_chunk(whole, 0, len(text), counter))
    asked = [
        TuneQuestion(q.text, q.answers, chunks[q.gold].file) for q in task.sample(count, SEED) if q.answers
    ]
    out.mkdir(parents=True, exist_ok=True)
    for kind in CONTEXTS:
        save_rows(out / f"held_out.{kind}.jsonl", tuning_rows(asked, chunks, kind, SEED))
    return len(asked)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--squad", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=1200, help="to be made from the folder")
    parser.add_argument("--held-out", type=int, default=250, help="of them, at least")
    parser.add_argument("--squad-questions", type=int, default=300)
    parser.add_argument("--model", default="smollm2", help="who makes them")
    parser.add_argument("--at-once", type=int, default=16)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    counter = load_embedder()
    print(
        f"{squad_rows(options.squad, options.out / 'squad', options.squad_questions, counter)} of SQuAD",
        flush=True,
    )
    chunks = chunks_of(options.folder, counter)
    print(f"{len(chunks)} passages", flush=True)
    questions = made(
        chunks, options.out / "questions.jsonl", options.questions, options.model, options.at_once
    )
    train, held = by_files(questions, options.held_out)
    for kind in CONTEXT_KINDS:
        save_rows(options.out / f"train.{kind}.jsonl", tuning_rows(train, chunks, kind, SEED))
        save_rows(options.out / f"held_out.{kind}.jsonl", tuning_rows(held, chunks, kind, SEED))
    print(f"{len(train)} to learn from, {len(held)} to test with")


if __name__ == "__main__":
    main()
