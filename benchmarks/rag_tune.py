"""Strategy search on real questions: beam with halving against greedy at equal evaluations, on held-out questions.

    python benchmarks/rag_tune.py --squad squaddev_v1.1.json --articles 16 --questions 600 --out runs/rag_tune

SQuAD's articles become files; the evidence of a question is the sentence of its gold paragraph that holds the answer,
in that file. The answer is the report's: the difference with its interval, and an HTML page.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

from mainspring.formats.files import write_file
from mainspring.rag.assembly import open_evaluator, open_index, open_variants
from mainspring.rag.chunking.sentences import sentences
from mainspring.rag.search.questions import TuneQuestion, answerable
from mainspring.rag.search.report import report
from mainspring.rag.search.space import Choice, Space, changes
from mainspring.rag.search.tune import TuneSettings, tune
from mainspring.rag.strategy import IndexStep, RerankStep, RetrieveStep, Strategy, to_toml

PRESENT = Strategy(
    index=IndexStep(size=200, overlap=0), retrieve=RetrieveStep(alpha=0.3), rerank=RerankStep("none")
)
# Settings that interact: the best weight depends on cutting, on sentences and on how much is handed on.
CHOICES = (
    Choice("retrieve.method", ("hybrid", "bm25", "dense")),
    Choice("retrieve.fusion", ("weighted", "reciprocal-rank")),
    Choice("retrieve.alpha", (0.3, 0.5, 0.7, 0.85, 1.0, 1.5)),
    Choice("retrieve.candidates", (10, 20, 50, 100)),
    Choice("retrieve.sentences", (False, True)),
    Choice("context.passages", (3, 5, 10)),
    Choice("context.summary", ("none", "extractive-bm25")),
    Choice("context.ratio", (0.3, 0.5, 0.8)),
)
CUTTING = (Choice("index.size", (60, 100, 200)), Choice("index.headers", (True, False)))


def corpus(squad: Path, folder: Path, articles: int, count: int, seed: int) -> list[TuneQuestion]:
    """Writes the articles as Markdown and gives questions about them with their evidence."""
    folder.mkdir(parents=True, exist_ok=True)
    data = json.loads(squad.read_bytes())["data"]
    random.Random(seed).shuffle(data)
    found: list[TuneQuestion] = []
    for article in data[:articles]:
        name = f"{article['title'].replace('/', '_')}.md"
        title = article["title"].replace("_", " ")
        body = "\n\n".join(paragraph["context"] for paragraph in article["paragraphs"])
        write_file((folder / name).absolute(), f"# {title}\n\n{body}\n".encode())
        for paragraph in article["paragraphs"]:
            parts = sentences(paragraph["context"])
            for qa in paragraph["qas"]:
                answer = qa["answers"][0]["text"]
                evidence = next((s for s in parts if answer in s), None)
                if evidence is not None:
                    found.append(TuneQuestion(qa["question"].strip(), (evidence,), name))
    random.Random(seed).shuffle(found)
    return found[:count]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--squad", type=Path, required=True)
    parser.add_argument("--articles", type=int, default=16)
    parser.add_argument("--questions", type=int, default=600)
    parser.add_argument("--budget", type=int, default=2000)
    parser.add_argument("--latency", type=float, default=2.0, help="seconds that the p95 may take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--cutting", action="store_true", help="search cutting as well: an index for each way"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/rag_tune"))
    options = parser.parse_args()
    asked = corpus(
        options.squad, options.out / "docs", options.articles, options.questions, seed=options.seed
    )
    directory = options.out / "index"
    opened = open_index(directory, PRESENT)
    opened.update(options.out / "docs")
    evaluate = (
        open_variants(directory, options.out / "docs", PRESENT)
        if options.cutting
        else open_evaluator(directory, PRESENT, embedder=opened.embedder)
    )
    usable, left_out = answerable(asked, evaluate.chunks())
    space = Space((*CUTTING, *CHOICES) if options.cutting else CHOICES)
    began = time.perf_counter()
    settings = TuneSettings(options.latency, options.budget, seed=options.seed)
    result = tune(evaluate, usable, space, PRESENT, settings)
    print(
        f"{len(usable)} questions ({len(left_out)} left out), {space.size:,} combinations, "
        f"{result.beam.spent} evaluations each, {time.perf_counter() - began:.0f} s"
    )
    for name, held in result.held.items():
        print(
            f"{name}: quality {held.quality}, p95 {held.figures.p95 * 1000:.0f} ms; {changes(held.strategy, PRESENT)}"
        )
    for comparison in result.comparisons:
        print(comparison)
    write_file((options.out / "tune.html").absolute(), report(result, len(left_out)).encode())
    write_file((options.out / "strategy.toml").absolute(), to_toml(result.recommended).encode())


if __name__ == "__main__":
    main()
