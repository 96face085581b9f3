"""Strategy search on real questions: beam with halving against greedy at equal evaluations, on held-out questions.

    python benchmarks/rag_tune.py --squad squaddev_v1.1.json --skip 24 --articles 16

SQuAD's articles become files; the evidence of a question is the sentence of its gold paragraph that holds the answer,
in that file. One search is one draw: what it finds depends on the questions that it saw. So each of --searches draws
its own questions to search on from those that are not held out, all searches spend the same on them, and what they
found is compared on the same held-out questions. Greedy comes twice: setting by setting, and by whole modules. The
intervals are bootstraps over searches and questions together.

Texts, vectors and what parts gave are kept in memory: no latency is measured, and none limits the choice.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from mainspring.errors import ConfigError
from mainspring.formats.files import write_file
from mainspring.rag.assembly import open_index, open_pipeline
from mainspring.rag.chunking.chunk import Chunk
from mainspring.rag.chunking.sentences import sentences
from mainspring.rag.embedding.embedder import Embedder, Progress
from mainspring.rag.evaluation.bootstrap import Interval, bootstrap
from mainspring.rag.generation.extraction import Bm25Extraction
from mainspring.rag.retrieval.sentence_vectors import SentenceVectors
from mainspring.rag.search.cached_parts import Recorder
from mainspring.rag.search.evaluator import PipelineEvaluator
from mainspring.rag.search.ledger import Evaluate, Ledger, Outcome
from mainspring.rag.search.questions import TuneQuestion, answerable
from mainspring.rag.search.remainder import spend_rest
from mainspring.rag.search.space import Choice, Space, canonical, changes
from mainspring.rag.search.stage_cache import StageCache
from mainspring.rag.search.tune import TuneSettings, search
from mainspring.rag.stores.store import Filter, Hit, VectorStore
from mainspring.rag.strategy import IndexStep, RerankStep, RetrieveStep, Strategy

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
SEED = 0
DEEPEST = 100  # passages that a retriever is asked for at most


def corpus(squad: Path, folder: Path, skip: int, articles: int) -> list[TuneQuestion]:
    """Writes the articles as Markdown and gives questions about them with their evidence."""
    folder.mkdir(parents=True, exist_ok=True)
    data = json.loads(squad.read_bytes())["data"]
    random.Random(SEED).shuffle(data)
    found: list[TuneQuestion] = []
    for article in data[skip : skip + articles]:
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
    random.Random(SEED).shuffle(found)
    return found


class MemoryStore:
    """The chunks of a store and what was found there, in memory. Implements what a pipeline needs of `VectorStore`."""

    def __init__(self, store: VectorStore) -> None:
        self._store = store
        self._chunks = {chunk.id: chunk for chunk in store.scan()}
        self._found: dict[bytes, list[Hit]] = {}

    def search(self, vector: npt.NDArray[np.float32], k: int, where: Filter = ()) -> list[Hit]:
        if where or k > DEEPEST:
            raise ConfigError(f"{k} chunks under {where} were not asked for when this store was written")
        key = vector.tobytes()
        if key not in self._found:
            self._found[key] = self._store.search(vector, DEEPEST)
        return self._found[key][:k]

    def get(self, ids: Sequence[str]) -> list[Chunk]:
        return [self._chunks[i] for i in ids if i in self._chunks]

    def scan(self) -> Iterator[Chunk]:
        return iter(self._chunks.values())


class MemoryCache(StageCache):
    """A stage cache that ends with the process: nothing of it is worth a file."""

    def __init__(self) -> None:
        super().__init__(Path())
        self._kept: dict[Path, npt.NDArray[Any]] = {}

    def _read(self, path: Path) -> npt.NDArray[Any] | None:
        return self._kept.get(path)

    def _keep(self, path: Path, value: npt.NDArray[Any]) -> None:  # type: ignore[override]  # there a static method
        self._kept[path] = value


class MemorySentences:
    """Sentence vectors, and each passage's cosine to a question's vector once it was asked for."""

    def __init__(self, sentences: SentenceVectors) -> None:
        self._sentences = sentences
        self._found: dict[tuple[bytes, str], float] = {}

    def prepare(self, passages: Sequence[str], progress: Progress | None = None) -> None:
        self._sentences.prepare(passages, progress)

    def cosines(self, vector: npt.NDArray[np.float32], passages: Sequence[str]) -> npt.NDArray[np.float32]:
        key = vector.tobytes()
        missing = [p for p in passages if (key, p) not in self._found]
        for passage, value in zip(missing, self._sentences.cosines(vector, missing), strict=True):
            self._found[key, passage] = float(value)
        return np.array([self._found[key, p] for p in passages], dtype=np.float32)


def in_memory(directory: Path, embedder: Embedder) -> PipelineEvaluator:
    """What evaluates on an index without reading a file twice."""
    parts = open_pipeline(directory, PRESENT, embedder=embedder, citations=False).parts
    sentences = SentenceVectors(directory / "sentences", embedder)
    sentences.prepare([chunk.text for chunk in parts.store.scan()])
    store = cast(VectorStore, MemoryStore(parts.store))
    return PipelineEvaluator(
        dataclasses.replace(parts, store=store, sentences=MemorySentences(sentences)),
        Recorder(MemoryCache()),
        lambda strategy: None,
        lambda strategy: Bm25Extraction(),
    )


class Outcomes:
    """Every outcome once, whichever search asks for it."""

    def __init__(self, evaluate: Evaluate) -> None:
        self._evaluate = evaluate
        self._found: dict[tuple[Strategy, TuneQuestion], Outcome] = {}

    def __call__(self, strategy: Strategy, question: TuneQuestion) -> Outcome:
        pair = strategy, question
        if pair not in self._found:
            self._found[pair] = self._evaluate(strategy, question)
        return self._found[pair]


def by_modules(ledger: Ledger, space: Space, base: Strategy) -> list[Strategy]:
    """Greedy over modules whose settings are tried in every combination, as AutoRAG's nodes are: the best first."""
    modules: dict[str, list[Choice]] = {}
    for choice in space.choices:
        modules.setdefault(choice.key.split(".")[0], []).append(choice)
    best = canonical(base)
    sizes = [
        len({Space(tuple(choices)).at(i, best) for i in range(Space(tuple(choices)).size)})
        for choices in modules.values()
    ]
    count = max(1, min(ledger.all_questions, ledger.budget // (1 + sum(sizes))))
    tried = {best: None}
    for choices in modules.values():
        module = Space(tuple(choices))
        pool = dict.fromkeys([best, *(module.at(i, best) for i in range(module.size))])
        done = [strategy for strategy in pool if ledger.extend(strategy, count)]
        tried.update(dict.fromkeys(done))
        best = ledger.ranked(done, count)[0]
    return [best, *ledger.ranked([s for s in tried if s != best and ledger.seen(s) >= count], count)]


def run(
    evaluate: Evaluate, drawn: Sequence[TuneQuestion], space: Space, settings: TuneSettings
) -> dict[str, Ledger]:
    """What each search evaluated; its leader is its find."""
    beam, greedy = search(evaluate, drawn, space, PRESENT, settings)
    modules = Ledger(evaluate, drawn, beam.spent, settings.limit)
    found = by_modules(modules, space, PRESENT)
    spend_rest(modules, space, PRESENT, found, random.Random(settings.seed + 2))
    return {"beam": beam, "greedy": greedy, "greedy by whole modules": modules}


def over_both(differences: npt.NDArray[np.float64], resamples: int = 10_000, seed: int = 0) -> Interval:
    """The mean of [searches, questions] with its 95% interval, both drawn anew in each resample."""
    generator = np.random.default_rng(seed)
    searches, questions = differences.shape
    means = np.empty(resamples)
    for n in range(resamples):
        rows = np.bincount(generator.integers(searches, size=searches), minlength=searches)
        columns = np.bincount(generator.integers(questions, size=questions), minlength=questions)
        means[n] = rows @ differences @ columns / differences.size
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(differences.mean()), float(low), float(high))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--squad", type=Path, required=True)
    parser.add_argument("--articles", type=int, default=16)
    parser.add_argument("--skip", type=int, default=0, help="articles that are left out before them")
    parser.add_argument("--held", type=int, default=1000, help="questions that no search sees")
    parser.add_argument("--searched", type=int, default=200, help="questions that one search sees")
    parser.add_argument("--searches", type=int, default=10)
    parser.add_argument("--budgets", type=int, nargs="+", default=[1500], help="evaluations of each search")
    parser.add_argument("--out", type=Path, default=Path("runs/rag_tune"))
    options = parser.parse_args()
    asked = corpus(options.squad, options.out / "docs", options.skip, options.articles)
    directory = options.out / "index"
    opened = open_index(directory, PRESENT)
    opened.update(options.out / "docs")
    evaluate = Outcomes(in_memory(directory, opened.embedder))
    usable, left_out = answerable(asked, opened.store.scan())
    held, rest = usable[: options.held], usable[options.held :]
    taken = {question.text.casefold() for question in held}
    pool = [question for question in rest if question.text.casefold() not in taken]
    space = Space(CHOICES)
    print(
        f"{len(pool)} questions to draw from, {len(held)} held out ({len(left_out)} left out), "
        f"{space.size:,} combinations, {opened.store.count()} passages"
    )

    def qualities(strategy: Strategy) -> list[float]:
        return [evaluate(strategy, question).quality for question in held]

    present = np.array(qualities(canonical(PRESENT)))
    print(f"present: {bootstrap(present.tolist())}")
    print("| budget | search | held out | minus present | beam minus this |\n|---|---|---|---|---|")
    for budget in options.budgets:
        found: dict[str, list[list[float]]] = {}
        for seed in range(options.searches):
            began = time.perf_counter()
            drawn = random.Random(seed).sample(pool, options.searched)
            settings = TuneSettings(limit=1e9, budget=budget, seed=seed)
            for name, ledger in run(evaluate, drawn, space, settings).items():
                leader = ledger.leader()
                found.setdefault(name, []).append(qualities(leader))
                print(
                    f"budget {budget}, search {seed}, {name}: {np.mean(found[name][-1]):.3f} after {ledger.spent}, "
                    f"{time.perf_counter() - began:.0f} s; {changes(leader, PRESENT)}",
                    flush=True,
                )
        arrays = {name: np.array(values) for name, values in found.items()}
        for name, values in arrays.items():
            minus = "" if name == "beam" else over_both(arrays["beam"] - values)
            print(
                f"| {budget} | {name} | {over_both(values)} | {over_both(values - present)} | {minus} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
