"""Calibrates and tests abstention: when does the reranker's best score say that the documents hold no answer?

    python benchmarks/rag_abstention.py --squad squaddev_v1.1.json

A question counts as unanswerable once its gold paragraph is out of the corpus. The threshold is chosen on one half of
the questions and tested on the other. Pair scores come from the cache that rag_retrieval.py fills.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from mainspring.rag.evaluation.bootstrap import bootstrap
from mainspring.rag.evaluation.squad import Question, load_squad
from mainspring.rag.generation.abstention import calibrate
from mainspring.rag.ranking.cross_encoder import CrossEncoder
from mainspring.rag.retrieval.bm25 import Bm25Index
from mainspring.rag.search.stage_cache import StageCache

RERANKER = "ms-marco-minilm-l12-v2"
SEED = 20261126  # that of rag_retrieval.py, whose scores are reused


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--squad", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("runs/rag_cache"))
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--depth", type=int, default=10)
    options = parser.parse_args()
    task, cache, reranker = load_squad(options.squad), StageCache(options.cache), CrossEncoder()
    bm25 = Bm25Index.build(task.passages)

    def best_scores(question: Question) -> tuple[float, float]:
        """The best score over the first passages, and over those of them that are not gold."""
        positions = bm25.search(question.text, options.depth).positions.tolist()
        texts = [task.passages[p] for p in positions]
        keys = [[RERANKER, question.text, text] for text in texts]
        scores = cache.get_many("pair", keys, lambda m: reranker.scores(question.text, [texts[i] for i in m]))
        without = [float(s) for p, s in zip(positions, scores, strict=True) if p != question.gold]
        return float(max(scores, default=-np.inf)), max(without, default=-np.inf)

    pairs = [best_scores(q) for q in task.sample(options.questions, SEED)]
    half = len(pairs) // 2
    chosen = calibrate([with_gold for with_gold, _ in pairs[:half]], [without for _, without in pairs[:half]])
    held = pairs[half:]
    answered = bootstrap([float(with_gold >= chosen.threshold) for with_gold, _ in held])
    abstained = bootstrap([float(without < chosen.threshold) for _, without in held])
    print(
        f"threshold {chosen.threshold:.2f}, chosen on {half} questions "
        f"(balanced accuracy {chosen.balanced_accuracy:.3f})"
    )
    print(f"held-out {len(held)}: answerable answered {answered}, unanswerable abstained {abstained}")


if __name__ == "__main__":
    main()
