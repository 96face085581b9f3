"""From names to running parts: the index, store, models and pipeline that a strategy asks for."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable
from pathlib import Path

from mainspring.errors import ConfigError, EmptyCorpusError, ModelNotFoundError
from mainspring.rag.classification.classifier import QueryClassifier
from mainspring.rag.embedding.embedder import Embedder
from mainspring.rag.embedding.models import load_embedder
from mainspring.rag.generation.extraction import Bm25Extraction, EmbeddingExtraction, Summariser
from mainspring.rag.generation.language_model import EndpointModel, InProcessModel, LanguageModel, TokenScorer
from mainspring.rag.generation.pruning import Abstraction, LongLlmLingua, SelectiveContext
from mainspring.rag.generation.reading import ExtractiveReader, GenerativeReader, Reader
from mainspring.rag.index import DocumentIndex, read_manifest
from mainspring.rag.pipeline import Parts, Pipeline
from mainspring.rag.ranking.cross_encoder import CrossEncoder
from mainspring.rag.ranking.late_interaction import LateInteraction
from mainspring.rag.ranking.precomputed import PrecomputedLateInteraction
from mainspring.rag.ranking.reranker import Reranker
from mainspring.rag.retrieval.lexical import Lexical, LexicalIndex, StoreLexical
from mainspring.rag.retrieval.sentence_vectors import SentenceVectors
from mainspring.rag.retrieval.splade import SpladeIndex, SpladeModel
from mainspring.rag.search.cached_parts import Recorder
from mainspring.rag.search.evaluator import PipelineEvaluator
from mainspring.rag.search.stage_cache import StageCache
from mainspring.rag.search.variants import VariantEvaluator
from mainspring.rag.stores.lance import LanceStore
from mainspring.rag.stores.store import VectorStore
from mainspring.rag.strategy import IndexStep, RerankStep, Strategy

RECOMP_LEAST = 0.2  # cosine under which a sentence helps nothing (all-MiniLM-L6-v2; chosen by hand)
_NEED_MODEL = ("selective-context", "longllmlingua", "abstractive")


def store_opener(address: str | None) -> Callable[[Path, int], VectorStore]:
    """What opens the store: LanceDB inside the index directory, or Milvus at an address (a URL or a .db file)."""
    if address is None:
        return lambda directory, dimension: LanceStore(directory / "store", dimension)
    if not (address.startswith(("http://", "https://")) or address.endswith(".db")):
        raise ConfigError(
            f"the store {address!r} is neither an http(s) address of Milvus nor a file ending in .db"
        )

    def open_milvus(directory: Path, dimension: int) -> VectorStore:
        from mainspring.rag.stores.milvus import MilvusStore  # its client takes a second to load

        return MilvusStore(address, dimension)

    return open_milvus


def open_index(
    directory: Path, strategy: Strategy, *, store: str | None = None, embedder: Embedder | None = None
) -> DocumentIndex:
    """The index in a directory, for updating. Raises what `DocumentIndex` and `load_embedder` raise."""
    loaded = embedder if embedder is not None else load_embedder(strategy.index.embedder)
    by_store = strategy.retrieve.lexical == "store"
    return DocumentIndex(directory, strategy.index, loaded, store_opener(store), store_text=by_store)


def open_pipeline(
    directory: Path,
    strategy: Strategy,
    *,
    store: str | None = None,
    embedder: Embedder | None = None,
    model: LanguageModel | None = None,
    citations: bool = True,
) -> Pipeline:
    """A pipeline over the index in a directory, as it is now.

    The steps of indexing are those that the index was made with: of the strategy only the others count. Without
    `citations` no reranker is loaded for them. Raises EmptyCorpusError if there is no index, and what its parts raise.
    """
    manifest = read_manifest(directory)
    if manifest is None:
        raise EmptyCorpusError(f"there is no index in {directory}: run `mainspring rag index FOLDER` first")
    loaded = embedder if embedder is not None else load_embedder(str(manifest["embedder"]))
    opened = store_opener(store)(directory, loaded.dimension)
    reranker = make_reranker(strategy, directory)
    attributor = reranker if isinstance(reranker, CrossEncoder) else CrossEncoder() if citations else None
    parts = Parts(
        embedder=loaded,
        store=opened,
        lexical=open_lexical(directory, strategy, opened),
        reranker=reranker,
        attributor=attributor,
        summariser=make_summariser(strategy, loaded, model),
        model=model,
        sentences=make_sentences(strategy, directory, loaded),
        classifier=QueryClassifier.load(directory, loaded) if strategy.retrieve.classify else None,
    )
    return Pipeline(strategy, parts)


def open_lexical(directory: Path, strategy: Strategy, store: VectorStore) -> Lexical:
    """What searches by words, as the strategy names it. Raises ConfigError, ModelNotFoundError, CheckpointError."""
    if strategy.retrieve.lexical == "store":
        return StoreLexical(store)
    if strategy.retrieve.lexical == "splade":
        path = Path(strategy.retrieve.splade).expanduser()
        if not strategy.retrieve.splade or not path.is_dir():
            raise ModelNotFoundError(
                f"SPLADE needs a model of yours: there is no directory {strategy.retrieve.splade!r} (retrieve.splade)"
            )
        return SpladeIndex.build(store, SpladeModel(path), StageCache(directory / "splade"))
    return LexicalIndex.open(directory / "bm25", store)


def open_evaluator(
    directory: Path,
    strategy: Strategy,
    *,
    store: str | None = None,
    embedder: Embedder | None = None,
    model: LanguageModel | None = None,
    answers: bool = False,
    cache: Path | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> PipelineEvaluator:
    """What runs strategies on questions over an index; results are kept in its directory, or in `cache`.

    With `answers` quality is that of the answer, by the model or, without one, by the best sentence. `clock` times the
    parts; a cache holds times of one clock. Raises as `open_pipeline`.
    """
    reader: Reader | None = None
    if answers:
        reader = GenerativeReader(model) if model is not None else ExtractiveReader(CrossEncoder())
    plain = dataclasses.replace(strategy, rerank=RerankStep("none"))
    parts = open_pipeline(
        directory, plain, store=store, embedder=embedder, model=model, citations=False
    ).parts

    if parts.sentences is None:  # a strategy that is tried may want them
        parts = dataclasses.replace(parts, sentences=SentenceVectors(directory / "sentences", parts.embedder))

    def reranker(wanted: Strategy) -> Reranker | None:
        made = make_reranker(wanted, directory)
        if isinstance(made, PrecomputedLateInteraction):
            made.prepare(
                [chunk.indexed_text for chunk in parts.store.scan()]
            )  # as indexing for it would have
        return made

    return PipelineEvaluator(
        dataclasses.replace(parts, summariser=None),
        Recorder(StageCache(cache or directory / "tune"), clock),
        reranker,
        lambda wanted: make_summariser(wanted, parts.embedder, model),
        reader,
        vectors=", late" if (read_manifest(directory) or {}).get("late") else "",
    )


def open_variants(
    directory: Path,
    folder: Path,
    strategy: Strategy,
    *,
    model: LanguageModel | None = None,
    answers: bool = False,
    cache: Path | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> VariantEvaluator:
    """As `open_evaluator`, for strategies that cut or embed in other ways too.

    Their indexes of the folder are made under `tune/indexes` when they are first tried, and brought up to date.
    """

    def open_one(step: IndexStep) -> PipelineEvaluator:
        address = hashlib.sha256(repr(step).encode()).hexdigest()[:16]
        place = directory if step == strategy.index else directory / "tune" / "indexes" / address
        wanted = dataclasses.replace(strategy, index=step)
        opened = open_index(place, wanted)
        opened.update(folder)
        if (sentences := make_sentences(wanted, place, opened.embedder)) is not None:
            sentences.prepare([chunk.text for chunk in opened.store.scan()])
        return open_evaluator(
            place,
            wanted,
            embedder=opened.embedder,
            model=model,
            answers=answers,
            cache=cache or directory / "tune",
            clock=clock,
        )

    return VariantEvaluator(strategy.index, open_one)


def make_sentences(strategy: Strategy, directory: Path, embedder: Embedder) -> SentenceVectors | None:
    """The sentence vectors of the index, if the strategy compares them."""
    return SentenceVectors(directory / "sentences", embedder) if strategy.retrieve.sentences else None


def make_reranker(strategy: Strategy, directory: Path) -> Reranker | None:
    """The reranker that the strategy names. Raises ModelNotFoundError."""
    method = strategy.rerank.method
    if method == "cross-encoder":
        return CrossEncoder()
    if method == "late-interaction":
        return LateInteraction()
    if method == "precomputed":
        return PrecomputedLateInteraction(directory / "tokens", LateInteraction())
    return None


def make_summariser(strategy: Strategy, embedder: Embedder, model: LanguageModel | None) -> Summariser | None:
    """The summariser that the strategy names. Raises ConfigError if it needs a model (in this process, to prune)."""
    method = strategy.context.summary
    if method in _NEED_MODEL and model is None:
        return None  # searching alone does not summarise; asking refuses without a model
    if method == "extractive-bm25":
        return Bm25Extraction()
    if method in ("extractive-embedding", "recomp"):
        return EmbeddingExtraction(embedder, RECOMP_LEAST if method == "recomp" else -1.0)
    if method == "abstractive" and model is not None:
        return Abstraction(model)
    if method in ("selective-context", "longllmlingua"):
        scorer: TokenScorer | None = model if isinstance(model, InProcessModel) else None
        if scorer is None:
            raise ConfigError(
                f"{method!r} needs token probabilities: give a model in this process, not an endpoint"
            )
        return SelectiveContext(scorer) if method == "selective-context" else LongLlmLingua(scorer)
    return None


def open_model(name: str, at_once: int = 1) -> LanguageModel:
    """A model in this process (a name, a directory, a GGUF file), or an endpoint (`http://host/v1` or `URL#model`).

    `at_once`: how many answers the former can write side by side (`complete_each`).
    """
    if name.startswith(("http://", "https://")):
        url, _, model = name.partition("#")
        return EndpointModel(url, model)
    return InProcessModel(name, at_once=at_once)
