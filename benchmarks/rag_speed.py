"""Search latency at many chunks, and how fast a folder is indexed, on a CPU.

    python benchmarks/rag_speed.py --squad squaddev_v1.1.json --chunks 100000

The chunks' texts are SQuAD's paragraphs in shuffled word order and their vectors those of real paragraphs with noise,
because embedding 100,000 of them takes the better part of an hour here; the latency of a search depends on neither.
Query embedding is included, reranking is not. `--folder` indexes real documents instead.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mainspring.ops.threads import set_num_threads
from mainspring.rag.assembly import open_index
from mainspring.rag.chunking.chunk import Chunk
from mainspring.rag.documents.document import Place
from mainspring.rag.embedding.embedder import Embedder, Vectors
from mainspring.rag.embedding.models import load_embedder
from mainspring.rag.evaluation.squad import Task, load_squad
from mainspring.rag.pipeline import Parts, Pipeline
from mainspring.rag.retrieval.lexical import LexicalIndex
from mainspring.rag.stores.lance import LanceStore
from mainspring.rag.stores.store import Condition
from mainspring.rag.strategy import RECIPES

CENTRES = 64  # real paragraphs whose vectors the made-up ones scatter around
PER_FILE = 50
AT_ONCE = 10_000


def made_chunks(task: Task, count: int, embedder: Embedder) -> tuple[list[Chunk], Vectors]:
    """Chunks with texts and vectors that look like real ones."""
    generator, numbers = random.Random(0), np.random.default_rng(0)
    passages = [p for p in task.passages if embedder.count(p) <= embedder.window]
    centres = embedder.embed_passages(passages[:CENTRES])
    chunks = []
    for n in range(count):
        words = passages[n % len(passages)].split()
        generator.shuffle(words)
        text = " ".join(words)
        places = ((0, Place("line", 1)),)
        file = f"d{n // PER_FILE}.md"
        chunks.append(Chunk(f"{n:024d}", file, "0", "t", 0, len(text), text, "", text, 0, places, 100))
    noise = numbers.standard_normal((count, embedder.dimension), dtype=np.float32) / embedder.dimension**0.5
    vectors = centres[numbers.integers(len(centres), size=count)] + 0.8 * noise
    return chunks, vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def latency(task: Task, count: int, searches: int, dtype: str, work: Path | None) -> None:
    """Builds a store of `count` chunks and times searches, one after another."""
    embedder = load_embedder(dtype=dtype)
    with tempfile.TemporaryDirectory() as temporary:
        folder = work or Path(temporary)
        store = LanceStore(folder / "store", embedder.dimension)
        there = store.count() == count
        chunks, vectors = ([], np.empty(0)) if there else made_chunks(task, count, embedder)
        began = time.perf_counter()
        for first in range(0, 0 if there else count, AT_ONCE):
            part = chunks[first : first + AT_ONCE]
            store.replace(sorted({c.file for c in part}), part, vectors[first : first + AT_ONCE])
        written = time.perf_counter()
        store.optimise()
        indexed = time.perf_counter()
        LexicalIndex.refresh(folder / "bm25", store)
        lexical = LexicalIndex.open(folder / "bm25", store)
        print(
            f"{count} chunks: written in {written - began:.1f} s, optimised (full text) in {indexed - written:.1f} s, "
            f"BM25 {time.perf_counter() - indexed:.1f} s",
            flush=True,
        )
        pipeline = Pipeline(RECIPES["fast"], Parts(embedder, store, lexical))
        questions = [q.text for q in task.sample(searches + 20, seed=1)]
        for question in questions[:20]:
            pipeline.search(question, 10)
        times, used = [], []
        for question in questions[20:]:
            began, began_cpu = time.perf_counter(), time.process_time()
            pipeline.search(question, 10)
            times.append(time.perf_counter() - began)
            used.append(time.process_time() - began_cpu)
        print("| what | wall p50 ms | p95 | CPU p50 ms | p95 |\n|---|---|---|---|---|")
        _line(f"search of {searches} questions", times, used)
        queries = embedder.embed_queries(questions[20:])
        ids = [hit.id for hit in store.search(queries[0], 10)]
        parts: dict[str, Callable[[int], object]] = {
            "the question's vector": lambda n: embedder.embed_queries([questions[20 + n]]),
            "words": lambda n: lexical.search(questions[20 + n], 50),
            "vectors": lambda n: store.search(queries[n], 50),
            "vectors, one file in ten": lambda n: store.search(
                queries[n], 50, [Condition("file", "d1", True)]
            ),
            "words, one file in ten": lambda n: lexical.search(
                questions[20 + n], 50, [Condition("file", "d1", True)]
            ),
            "ten passages' texts": lambda n: store.get(ids),
        }
        for name, part in parts.items():
            part(0)
            times, used = [], []
            for number in range(min(searches, 100)):
                began, began_cpu = time.perf_counter(), time.process_time()
                part(number)
                times.append(time.perf_counter() - began)
                used.append(time.process_time() - began_cpu)
            _line(name, times, used)


def _line(name: str, wall: list[float], cpu: list[float]) -> None:
    cells = [f"{value:.1f}" for v in (wall, cpu) for value in np.percentile(np.array(v) * 1e3, [50, 95])]
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def indexing(folder: Path) -> None:
    """Indexes a folder into a temporary index, then again with nothing changed."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    with tempfile.TemporaryDirectory() as target:
        index = open_index(Path(target) / "index", RECIPES["default"])
        for name in ("first run", "nothing changed"):
            began, began_cpu = time.perf_counter(), time.process_time()
            report = index.update(folder)
            seconds, used = time.perf_counter() - began, time.process_time() - began_cpu
            print(
                f"{name}: {size / 1e6:.2f} MB, {report.chunks} chunks, {len(report.failures)} left out, "
                f"{seconds:.1f} s, {used:.1f} CPU s"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--squad", type=Path)
    parser.add_argument("--chunks", type=int, default=100_000)
    parser.add_argument("--searches", type=int, default=300)
    parser.add_argument("--work", type=Path, help="keeps the store for the next run")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--dtype", default="float32", help="of the embedder")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    set_num_threads(options.threads)
    if options.squad is not None:
        latency(load_squad(options.squad), options.chunks, options.searches, options.dtype, options.work)
    if options.folder is not None:
        indexing(options.folder)


if __name__ == "__main__":
    main()
