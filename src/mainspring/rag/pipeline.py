"""Runs a strategy over an index: question in, passages or a cited answer out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mainspring.errors import ConfigError, EmptyCorpusError
from mainspring.rag.chunking.chunk import Chunk
from mainspring.rag.classification.classifier import QueryClassifier
from mainspring.rag.embedding.embedder import Embedder
from mainspring.rag.generation.citations import Attributor, Citation, cited
from mainspring.rag.generation.extraction import Summariser
from mainspring.rag.generation.language_model import LanguageModel
from mainspring.rag.generation.prompts import ABSTENTION, answer_prompt, direct_prompt
from mainspring.rag.ranking.repacking import repack
from mainspring.rag.ranking.reranker import Reranker
from mainspring.rag.retrieval.fusion import min_max, reciprocal_rank_fusion, weighted_fusion
from mainspring.rag.retrieval.hits import Ranking
from mainspring.rag.retrieval.lexical import Lexical
from mainspring.rag.retrieval.query_forms import Probe, probes
from mainspring.rag.retrieval.sentence_vectors import Sentences
from mainspring.rag.stores.store import Filter, Hit, VectorStore
from mainspring.rag.strategy import Strategy


@dataclass(frozen=True)
class Passage:
    """A found chunk. `score` orders passages of one search: the reranker's (with the blend), else the retrieval's.

    `rerank_score` is the reranker's own, None without one.
    """

    chunk: Chunk
    score: float
    rerank_score: float | None = None


@dataclass(frozen=True)
class Answer:
    """A finished answer. Citation numbers count `passages` from 1. `abstained`: no passage was taken to answer.

    Without passages and not abstained: the question was one that needs no document.
    """

    text: str
    citations: tuple[Citation, ...]
    passages: tuple[Passage, ...]
    abstained: bool


@dataclass(frozen=True)
class Delta:
    """The next piece of an answer's text."""

    text: str


Event = Delta | Citation | Answer  # an answer comes last, and holds everything


@dataclass(frozen=True)
class Parts:
    """What a strategy's steps run on. A part that no step uses may be None."""

    embedder: Embedder
    store: VectorStore
    lexical: Lexical
    reranker: Reranker | None = None
    attributor: Reranker | None = None
    summariser: Summariser | None = None
    model: LanguageModel | None = None
    classifier: QueryClassifier | None = None
    sentences: Sentences | None = None


@dataclass(frozen=True)
class Pipeline:
    """A strategy with its parts; runs from several threads if its parts do."""

    strategy: Strategy
    parts: Parts

    def search(self, question: str, k: int | None = None, where: Filter = ()) -> list[Passage]:
        """The best passages for a question, best first: as many as the context holds, or k.

        Raises ConfigError for an empty question or a missing part, EmptyCorpusError if the index is empty.
        """
        if not question.strip():
            raise ConfigError("the question is empty")
        if len(self.parts.lexical) == 0:
            raise EmptyCorpusError("the index is empty: run `mainspring rag index FOLDER` first")
        steps = self.strategy
        count = k if k is not None else steps.context.passages
        pool = max(count, steps.retrieve.candidates)
        branches = [
            self._retrieve(probe, pool, where)
            for probe in probes(question, steps.retrieve.query, self.parts.embedder, self.parts.model)
        ]
        hits = branches[0] if len(branches) == 1 else _merged(branches, pool)
        return self._rerank(question, hits, count)

    def ask(
        self,
        question: str,
        where: Filter = (),
        *,
        seen: Sequence[str] = (),
        given: Sequence[Passage] = (),
    ) -> Iterator[Event]:
        """Streams the answer: pieces of text, a citation after each supported statement, at last all of it.

        `seen` is searched for beside the question, and `given` are passages at hand before any search; both come with
        a question about a picture.

        Raises what `search` raises, ConfigError without a model, RetrievalError if the model fails.
        """
        model = self.parts.model
        if model is None:
            raise ConfigError("answering needs a language model; searching does not")
        if question.strip() and not given and not self._needs_documents(question):
            pieces: list[str] = []
            for piece in model.stream(direct_prompt(question), self.strategy.answer.max_tokens):
                pieces.append(piece)
                yield Delta(piece)
            yield Answer("".join(pieces), (), (), False)
            return
        searched = self.search("\n".join([question, *seen]) if question.strip() else question, where=where)
        here = {passage.chunk.id for passage in given}
        found = [*given, *(passage for passage in searched if passage.chunk.id not in here)]
        if self._abstains(question, found):
            yield Delta(ABSTENTION)
            yield Answer(ABSTENTION, (), tuple(found), True)
            return
        texts, passages = self.context(question, found)
        chunks = [passage.chunk for passage in passages]
        prompt = answer_prompt(question, texts, [f"{c.file}, {c.place}" for c in chunks])
        attributor = Attributor(chunks, self.parts.attributor) if self.parts.attributor is not None else None
        text = ""
        citations: list[Citation] = []
        for event in cited(model.stream(prompt, self.strategy.answer.max_tokens), attributor):
            if isinstance(event, Citation):
                citations.append(event)
                yield event
            else:
                text += event
                yield Delta(event)
        yield Answer(text, tuple(citations), tuple(passages), False)

    def answer(self, question: str, where: Filter = ()) -> Answer:
        """The finished answer at once; raises what `ask` raises."""
        *_, last = self.ask(question, where)
        assert isinstance(last, Answer)  # `ask` ends with it
        return last

    def _needs_documents(self, question: str) -> bool:
        if not self.strategy.retrieve.classify:
            return True
        if self.parts.classifier is None:
            raise ConfigError(
                "the strategy classifies queries and the index has no classifier: run `mainspring rag classify`"
            )
        return self.parts.classifier.needs_documents(question, self.parts.embedder)

    def _retrieve(self, probe: Probe, k: int, where: Filter) -> list[Hit]:
        step = self.strategy.retrieve
        sparse = self.parts.lexical.search(probe.text, k, where) if step.method != "dense" else []
        dense = self.parts.store.search(probe.vector, k, where) if step.method != "bm25" else []
        if step.sentences and step.method != "bm25":
            dense = self._by_sentence(probe, dense, sparse)[:k]
        if step.method != "hybrid":
            return sparse or dense
        if step.fusion == "reciprocal-rank":
            return _merged([sparse, dense], k)
        ids, (first, second) = _numbered([sparse, dense])
        return _hits(ids, weighted_fusion(first, second, k, step.alpha, self.strategy.paper_compat))

    def _by_sentence(self, probe: Probe, dense: Sequence[Hit], sparse: Sequence[Hit]) -> list[Hit]:
        """All candidates by the nearest of the passage itself, where that is known, and its sentences."""
        if self.parts.sentences is None:
            raise ConfigError("the strategy compares sentences and no sentence vectors were given")
        chunks = self._chunks([*dense, *sparse])
        nearest = self.parts.sentences.cosines(probe.vector, [c.text for c in chunks.values()])
        best = {chunk_id: float(score) for chunk_id, score in zip(chunks, nearest, strict=True)}
        for hit in dense:
            if hit.id in best:
                best[hit.id] = max(best[hit.id], hit.score)
        return sorted((Hit(i, score) for i, score in best.items()), key=lambda hit: -hit.score)

    def _rerank(self, question: str, hits: Sequence[Hit], count: int) -> list[Passage]:
        step, reranker = self.strategy.rerank, self.parts.reranker
        if step.method == "none":
            chunks = self._chunks(hits[:count])
            return [Passage(chunks[h.id], h.score) for h in hits[:count] if h.id in chunks]
        if reranker is None:
            raise ConfigError(f"the strategy reranks by {step.method!r} and no reranker was given")
        head = hits[: max(step.depth, count)]
        chunks = self._chunks(head)
        head = [hit for hit in head if hit.id in chunks]
        scores = reranker.scores(question, [chunks[hit.id].indexed_text for hit in head])
        order = scores
        if step.blend:
            before = np.array([hit.score for hit in head], dtype=np.float32)
            order = min_max(scores) + step.blend * min_max(before)
        best = np.argsort(-order, kind="stable")[:count]
        return [Passage(chunks[head[i].id], float(order[i]), float(scores[i])) for i in best.tolist()]

    def _chunks(self, hits: Sequence[Hit]) -> dict[str, Chunk]:
        return {chunk.id: chunk for chunk in self.parts.store.get([hit.id for hit in hits])}

    def _abstains(self, question: str, passages: Sequence[Passage]) -> bool:
        """Whether no passage was found, or the cross-encoder thinks that none answers.

        The threshold is one on its scores: passages that something else has ordered are scored by the attributor.
        """
        if not passages:
            return True
        scores = [p.rerank_score for p in passages if p.rerank_score is not None]
        if self.strategy.rerank.method != "cross-encoder":
            if self.parts.attributor is None:
                return False
            scores = self.parts.attributor.scores(question, [p.chunk.indexed_text for p in passages]).tolist()
        return max(scores) < self.strategy.answer.abstain_below

    def context(self, question: str, found: Sequence[Passage]) -> tuple[list[str], list[Passage]]:
        """The texts that the model reads of found passages, in its order, and the passage of each.

        Passages of which a summary leaves nothing are gone. Raises ConfigError without the summariser that it needs.
        """
        step = self.strategy.context
        passages = repack(found, step.order)
        texts = [passage.chunk.context for passage in passages]
        if step.summary == "none":
            return texts, passages
        if self.parts.summariser is None:
            raise ConfigError(f"the strategy summarises by {step.summary!r} and no summariser was given")
        short = self.parts.summariser.summarise(question, texts, step.ratio)
        kept = [(text, passage) for text, passage in zip(short, passages, strict=True) if text.strip()]
        return [text for text, _ in kept], [passage for _, passage in kept]


def _numbered(lists: Sequence[Sequence[Hit]]) -> tuple[list[str], list[Ranking]]:
    """Hits as rankings over positions of a list of their ids, which the fusions work on."""
    ids = list(dict.fromkeys(hit.id for hits in lists for hit in hits))
    position = {chunk_id: p for p, chunk_id in enumerate(ids)}
    rankings = []
    for hits in lists:
        positions = np.array([position[hit.id] for hit in hits], dtype=np.int64)
        rankings.append(Ranking(positions, np.array([hit.score for hit in hits], dtype=np.float32)))
    return ids, rankings


def _hits(ids: Sequence[str], ranking: Ranking) -> list[Hit]:
    return [Hit(ids[p], float(s)) for p, s in zip(ranking.positions, ranking.scores, strict=True)]


def _merged(lists: Sequence[Sequence[Hit]], k: int) -> list[Hit]:
    """By reciprocal ranks: scores of different methods or questions are not comparable, ranks are."""
    ids, rankings = _numbered(lists)
    return _hits(ids, reciprocal_rank_fusion(rankings, k))
