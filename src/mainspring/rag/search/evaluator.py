"""One strategy on one question, run by the pipeline that serves it, over parts whose results are kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mainspring.rag.chunking.chunk import Chunk
from mainspring.rag.evaluation.measures import token_f1
from mainspring.rag.generation.extraction import Summariser
from mainspring.rag.generation.reading import Reader
from mainspring.rag.pipeline import Parts, Passage, Pipeline
from mainspring.rag.ranking.reranker import Reranker
from mainspring.rag.search.cached_parts import (
    CachedEmbedder,
    CachedLexical,
    CachedModel,
    CachedReranker,
    CachedSentences,
    CachedStore,
    CachedSummariser,
    Recorder,
    corpus_address,
)
from mainspring.rag.search.ledger import Outcome
from mainspring.rag.search.questions import TuneQuestion
from mainspring.rag.strategy import Strategy

_WARM = "a first call is slower than the others"


@dataclass(frozen=True)
class Retrieved:
    """What a strategy hands to the generator: `texts` in its order, the passage of each, and what that took.

    `found` holds the passages as they were ranked, the best first. `seconds` are those of the parts without a cache,
    by the recorder's clock; `read` counts the characters that models read.
    """

    found: tuple[Passage, ...]
    texts: tuple[str, ...]
    passages: tuple[Passage, ...]
    seconds: float
    read: int

    @property
    def sources(self) -> list[str]:
        """Of each text: file and place."""
        return [f"{passage.chunk.file}, {passage.chunk.place}" for passage in self.passages]


class PipelineEvaluator:
    """Implements `Evaluate`: how well, how fast and at which cost a strategy brings a question's evidence.

    With a reader quality is the F1 of its answer's words against the evidence. Without one it is the reciprocal rank of
    the first passage whose text holds the evidence as the generator would read it (cut or shortened by the strategy),
    0 if there is none. Cost counts characters that models read: queries, passages for a reranker, what is summarised,
    and the context itself. The answer's generation is not timed.
    """

    def __init__(
        self,
        parts: Parts,
        recorder: Recorder,
        make_reranker: Callable[[Strategy], Reranker | None],
        make_summariser: Callable[[Strategy], Summariser | None],
        reader: Reader | None = None,
        vectors: str = "",
    ) -> None:
        """`parts` without reranker and summariser; these are made when a strategy first names them.

        `vectors` tells vectors of the same passages by the same model apart: late chunking makes others.
        """
        corpus = corpus_address(parts.store.scan())
        embedder = CachedEmbedder(parts.embedder, recorder)
        self._parts = dataclasses.replace(
            parts,
            embedder=embedder,
            store=CachedStore(parts.store, corpus, embedder.name + vectors, recorder),
            lexical=CachedLexical(parts.lexical, corpus, recorder),
            model=CachedModel(parts.model, recorder) if parts.model is not None else None,
            attributor=None,
            sentences=CachedSentences(parts.sentences, embedder.name, recorder) if parts.sentences else None,
        )
        self._recorder = recorder
        self._make_reranker = make_reranker
        self._make_summariser = make_summariser
        self._reader = reader
        self._sentences_ready = False
        self._reader_name = f"{type(reader).__name__} {self._model_name()}"
        self._rerankers: dict[str, Reranker | None] = {"none": None}
        self._summarisers: dict[str, Summariser | None] = {"none": None}
        vector = parts.embedder.embed_queries([_WARM])[0]
        parts.store.search(vector, 1)
        parts.lexical.search(_WARM, 1)

    def chunks(self) -> Iterator[Chunk]:
        """Every passage of the index."""
        return self._parts.store.scan()

    def retrieve(self, strategy: Strategy, question: str) -> Retrieved:
        """What the strategy brings for a question; parts whose results are kept are not run again."""
        if strategy.retrieve.sentences and not self._sentences_ready:
            assert self._parts.sentences is not None  # the assembly gives them to every evaluator
            self._parts.sentences.prepare([chunk.text for chunk in self.chunks()])  # as indexing would have
            self._sentences_ready = True
        pipeline = Pipeline(
            strategy,
            dataclasses.replace(
                self._parts, reranker=self._reranker(strategy), summariser=self._summariser(strategy)
            ),
        )

        def run() -> tuple[list[Passage], list[str], list[Passage]]:
            found = pipeline.search(question)
            return found, *pipeline.context(question, found)

        (found, texts, passages), seconds, read = self._recorder.measure(run)
        return Retrieved(tuple(found), tuple(texts), tuple(passages), seconds, read)

    def __call__(self, strategy: Strategy, question: TuneQuestion) -> Outcome:
        brought = self.retrieve(strategy, question.text)
        cost = float(brought.read + sum(map(len, brought.texts)))
        if self._reader is not None:
            return Outcome(self._answered(strategy, question, brought), brought.seconds, cost)
        holding = {
            passage.chunk.id
            for text, passage in zip(brought.texts, brought.passages, strict=True)
            if question.found_in(text, passage.chunk.file)
        }
        ranks = (1 / rank for rank, passage in enumerate(brought.found, 1) if passage.chunk.id in holding)
        return Outcome(next(ranks, 0.0), brought.seconds, cost)

    def _answered(self, strategy: Strategy, question: TuneQuestion, brought: Retrieved) -> float:
        """The F1 of the reader's answer."""
        assert self._reader is not None  # asked only with one
        read, limit = self._reader.read, strategy.answer.max_tokens
        inputs = [self._reader_name, question.text, brought.texts, brought.sources, limit]
        answer: str = self._recorder.call(
            "answer", inputs, lambda: read(question.text, brought.texts, brought.sources, limit)
        )
        return token_f1(answer, question.evidence)

    def _reranker(self, strategy: Strategy) -> Reranker | None:
        method = strategy.rerank.method
        if method not in self._rerankers:
            made = self._make_reranker(strategy)
            if made is not None:
                made.scores(_WARM, [_WARM])
                made = CachedReranker(made, method, self._recorder, reads=method != "precomputed")
            self._rerankers[method] = made
        return self._rerankers[method]

    def _summariser(self, strategy: Strategy) -> Summariser | None:
        method = strategy.context.summary
        if method not in self._summarisers:
            made = self._make_summariser(strategy)
            if made is not None:
                by = f"{method} by {self._parts.embedder.name}, {self._model_name()}"
                made = CachedSummariser(made, by, self._recorder)
            self._summarisers[method] = made
        return self._summarisers[method]

    def _model_name(self) -> str:
        return self._parts.model.name if self._parts.model is not None else "no model"
