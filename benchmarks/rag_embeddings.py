"""Embedding throughput on a CPU: our packed encoder against sentence-transformers, in one run, round by round.

    python benchmarks/rag_embeddings.py --squad squaddev_v1.1.json

Texts of mixed length: questions, sentences and paragraphs of SQuAD, shuffled. Both give the same vectors (checked).
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from mainspring.rag.chunking.sentences import sentences
from mainspring.rag.embedding.embedder import Embedder, Vectors
from mainspring.rag.embedding.models import load_embedder, model_directory
from mainspring.rag.evaluation.squad import load_squad

NAME = "all-minilm-l6-v2"


def mixed_texts(squad: Path, count: int, embedder: Embedder) -> list[str]:
    """A third each of questions, sentences and paragraphs that fit the window."""
    task = load_squad(squad)
    generator = random.Random(0)
    questions = [q.text for q in task.questions]
    paragraphs = [p for p in task.passages if embedder.count(p) <= embedder.window]
    pieces = [s for p in task.passages[::7] for s in sentences(p)]
    texts = [t for kind in (questions, pieces, paragraphs) for t in generator.sample(kind, count // 3)]
    generator.shuffle(texts)
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--squad", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=240)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ours = load_embedder(NAME)
    half = load_embedder(NAME, dtype="bfloat16")
    peer = SentenceTransformer(str(model_directory(NAME, "embedder")), device="cpu")
    texts = mixed_texts(options.squad, options.texts, ours)
    tokens = sum(ours.count(text) for text in texts)
    rivals: dict[str, Callable[[], Vectors]] = {
        "sentence-transformers, batch_size=32": lambda: np.asarray(peer.encode(texts, batch_size=32)),
        "ours, float32": lambda: ours.embed_passages(texts),
        "ours, bfloat16": lambda: half.embed_passages(texts),
    }
    expected = np.asarray(peer.encode(texts[:32], batch_size=32))
    for embedder in (ours, half):
        embedder.embed_passages(texts[:32])
        cosine = (embedder.embed_passages(texts[:32]) * expected).sum(1).min()
        print(f"{embedder.name}: least cosine to sentence-transformers' vectors {cosine:.6f}")
    wall: dict[str, list[float]] = {name: [] for name in rivals}
    cpu: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(options.rounds):
        for name, run in rivals.items():
            began, began_cpu = time.perf_counter(), time.process_time()
            run()
            wall[name].append(time.perf_counter() - began)
            cpu[name].append(time.process_time() - began_cpu)
    print(f"{len(texts)} texts, {tokens} tokens, {options.threads} threads, {options.rounds} rounds")
    print("| who | best s | median s | texts/s (best) | CPU s (best) | speed-up (best, median, CPU) |")
    print("|---|---|---|---|---|---|")
    first = next(iter(rivals))
    for name in rivals:
        best, middle, used = min(wall[name]), float(np.median(wall[name])), min(cpu[name])
        ratios = (min(wall[first]) / best, float(np.median(wall[first])) / middle, min(cpu[first]) / used)
        shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"| {name} | {best:.2f} | {middle:.2f} | {len(texts) / best:.0f} | {used:.2f} | {shown} |")


if __name__ == "__main__":
    main()
