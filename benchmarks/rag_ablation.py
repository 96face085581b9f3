"""The paper's ablation on documents of one's own: one step changed at a time, EM, F1, faithfulness, latency.

    python benchmarks/rag_ablation.py --folder /usr/share/doc/python3.11/html/tutorial --questions 40

Questions are made from the documents by --model and kept beside the indexes (--work), so that a second run goes on with
them; the evidence is the sentence that a question was made of. Answers: the sentence that the cross-encoder puts first
(`--reader extractive`) or the model's (`--reader model`). All measures are deterministic; intervals are 95% bootstraps,
differences paired by question. Latency is the p50 of search and context, without the answer.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import time
from pathlib import Path

import numpy as np

from mainspring.formats.files import write_file
from mainspring.rag.assembly import (
    make_sentences,
    open_index,
    open_model,
    open_pipeline,
)
from mainspring.rag.evaluation.bootstrap import bootstrap, paired_difference
from mainspring.rag.evaluation.measures import exact_match, faithfulness, token_f1
from mainspring.rag.generation.language_model import LanguageModel
from mainspring.rag.generation.reading import ExtractiveReader, GenerativeReader, Reader
from mainspring.rag.pipeline import Pipeline
from mainspring.rag.ranking.cross_encoder import CrossEncoder
from mainspring.rag.ranking.precomputed import PrecomputedLateInteraction
from mainspring.rag.search.made_questions import make_questions
from mainspring.rag.search.questions import TuneQuestion, load_questions
from mainspring.rag.search.space import Choice, Value
from mainspring.rag.strategy import ContextStep, IndexStep, RerankStep, RetrieveStep, Strategy

BASE = Strategy(
    index=IndexStep(size=100, overlap=0),
    retrieve=RetrieveStep(candidates=20),
    rerank=RerankStep(depth=10),
    context=ContextStep(passages=3),
)
# The settings that differ from BASE, module by module, as in the paper's table 3. Those marked need the model.
CELLS: dict[str, dict[str, Value]] = {
    "base: sentences of 100 tokens, hybrid 1.0, cross-encoder, reverse, no summary": {},
    "chunks of 200 tokens": {"index.size": 200},
    "chunks small-to-big": {"index.chunking": "small-to-big", "index.size": 60},
    "chunks sliding window": {"index.chunking": "sliding-window", "index.size": 60},
    "chunks without headers": {"index.headers": False},
    "retrieval BM25": {"retrieve.method": "bm25"},
    "retrieval dense": {"retrieve.method": "dense"},
    "retrieval hybrid 0.3": {"retrieve.alpha": 0.3},
    "retrieval hybrid by reciprocal ranks": {"retrieve.fusion": "reciprocal-rank"},
    "retrieval hybrid with sentences": {"retrieve.alpha": 0.85, "retrieve.sentences": True},
    "retrieval BM25, no reranking": {"retrieve.method": "bm25", "rerank.method": "none"},
    "retrieval dense, no reranking": {"retrieve.method": "dense", "rerank.method": "none"},
    "no reranking": {"rerank.method": "none"},
    "no reranking, with sentences": {
        "rerank.method": "none",
        "retrieve.alpha": 0.85,
        "retrieve.sentences": True,
    },
    "reranking precomputed late interaction": {"rerank.method": "precomputed"},
    "order forward": {"context.order": "forward"},
    "order sides": {"context.order": "sides"},
    "summary extractive by BM25, 0.5": {"context.summary": "extractive-bm25"},
    "summary extractive by embeddings, 0.5": {"context.summary": "extractive-embedding"},
    "summary Recomp-style, 0.5": {"context.summary": "recomp"},
    "query HyDE with the query (model)": {"retrieve.query": "hyde-with-query"},
    "query rewritten (model)": {"retrieve.query": "rewrite"},
    "query decomposed (model)": {"retrieve.query": "decompose"},
    "summary Selective Context, 0.5 (model)": {"context.summary": "selective-context"},
}


def cell_strategy(settings: dict[str, Value]) -> Strategy:
    strategy = BASE
    for key, value in settings.items():
        strategy = Choice(key, (value,)).applied(strategy, value)
    return strategy


def indexed(folder: Path, work: Path, strategy: Strategy) -> Path:
    """The directory of the index that a strategy wants, brought up to date with what its steps precompute."""
    address = hashlib.sha256(repr(strategy.index).encode()).hexdigest()[:12]
    directory = work / address
    index = open_index(directory, strategy)
    index.update(folder)
    if (sentences := make_sentences(strategy, directory, index.embedder)) is not None:
        sentences.prepare([chunk.text for chunk in index.store.scan()])
    return directory


def questions_of(folder: Path, work: Path, count: int, model: LanguageModel) -> tuple[TuneQuestion, ...]:
    path = work / "questions.jsonl"
    if not path.is_file():
        directory = indexed(folder, work, BASE)
        chunks = open_pipeline(directory, BASE, citations=False).parts.store.scan()
        made = make_questions(chunks, model, CrossEncoder(threads=1), count, seed=0)
        rows = [{"question": q.text, "evidence": list(q.evidence), "file": q.file} for q in made]
        write_file(path.absolute(), "".join(json.dumps(row) + "\n" for row in rows).encode())
    return load_questions(path)[:count]


@dataclasses.dataclass
class Cell:
    """What one strategy did, a value a question."""

    em: list[float] = dataclasses.field(default_factory=list)
    f1: list[float] = dataclasses.field(default_factory=list)
    faithful: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)


def run(pipeline: Pipeline, questions: tuple[TuneQuestion, ...], reader: Reader) -> Cell:
    cell = Cell()
    pipeline.context(questions[0].text, pipeline.search(questions[0].text))
    for question in questions:
        began = time.perf_counter()
        texts, passages = pipeline.context(question.text, pipeline.search(question.text))
        cell.seconds.append(time.perf_counter() - began)
        sources = [f"{p.chunk.file}, {p.chunk.place}" for p in passages]
        answer = reader.read(question.text, texts, sources, 48)
        cell.em.append(exact_match(answer, question.evidence))
        cell.f1.append(token_f1(answer, question.evidence))
        cell.faithful.append(faithfulness(answer, texts))
    return cell


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/rag_ablation"))
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--reader", choices=("extractive", "model"), default="extractive")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--cells", nargs="+", default=list(CELLS), help="by the beginning of their names")
    parser.add_argument("--no-model", action="store_true", help="leave out the steps that need the model")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    model: LanguageModel | None = None
    if not (options.no_model and (options.work / "questions.jsonl").is_file()):
        model = open_model(options.model)
    if model is None:
        questions = load_questions(options.work / "questions.jsonl")[: options.questions]
    else:
        questions = questions_of(options.folder, options.work, options.questions, model)
    cross_encoder = CrossEncoder(threads=1)
    reader: Reader = ExtractiveReader(cross_encoder)
    if options.reader == "model":
        assert model is not None
        reader = GenerativeReader(model)
    print(f"{len(questions)} questions, answers: {options.reader}")
    print("| step | EM | F1 | F1 minus base | faithfulness | p50 ms |\n|---|---|---|---|---|---|")
    base: Cell | None = None
    for name, settings in CELLS.items():
        if not any(name.startswith(wanted) for wanted in options.cells) and base is not None:
            continue
        if options.no_model and "(model)" in name:
            continue
        strategy = cell_strategy(settings)
        directory = indexed(options.folder, options.work, strategy)
        pipeline = open_pipeline(directory, strategy, model=model, citations=False)
        if strategy.rerank.method == "cross-encoder":
            pipeline = dataclasses.replace(
                pipeline, parts=dataclasses.replace(pipeline.parts, reranker=cross_encoder)
            )
        elif isinstance(pipeline.parts.reranker, PrecomputedLateInteraction):
            pipeline.parts.reranker.prepare([c.indexed_text for c in pipeline.parts.store.scan()])
        cell = run(pipeline, questions, reader)
        base = base or cell
        difference = "" if cell is base else str(paired_difference(cell.f1, base.f1))
        print(
            f"| {name} | {bootstrap(cell.em)} | {bootstrap(cell.f1)} | {difference} | "
            f"{float(np.mean(cell.faithful)):.2f} | {float(np.median(cell.seconds)) * 1000:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
