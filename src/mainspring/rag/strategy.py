"""A strategy: every step of the workflow, named, as one frozen value; read from and written to TOML.

`best` and `balanced` are the two recipes of arXiv 2407.01219 (section 4.3), with these stand-ins, because the weights
of the originals are not to be had as packages: an ms-marco cross-encoder for monoT5, late interaction over vectors
made at indexing time for TILDEv2, and sentences chosen by embeddings for Recomp's trained selector.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mainspring.errors import RecipeError
from mainspring.rag.chunking.chunk import Chunker
from mainspring.rag.chunking.chunkers import SlidingWindowChunker, SmallToBigChunker, SplitChunker
from mainspring.rag.embedding.models import DEFAULT_EMBEDDER
from mainspring.rag.retrieval.fusion import PAPER_ALPHA

Chunking = Literal["sentences", "tokens", "small-to-big", "sliding-window"]
QueryForm = Literal["original", "rewrite", "decompose", "hyde", "hyde-with-query"]
Method = Literal["bm25", "dense", "hybrid"]
Lexical = Literal["postings", "store", "splade"]
Fusion = Literal["weighted", "reciprocal-rank"]
RerankMethod = Literal["none", "cross-encoder", "late-interaction", "precomputed"]
Order = Literal["forward", "reverse", "sides"]
Summary = Literal[
    "none",
    "extractive-bm25",
    "extractive-embedding",
    "recomp",
    "selective-context",
    "longllmlingua",
    "abstractive",
]


def _bounded(default: float, low: float, high: float = math.inf) -> Any:
    return field(default=default, metadata={"low": low, "high": high})


@dataclass(frozen=True)
class IndexStep:
    """How documents are cut and embedded. `late` averages token states of the whole document (late chunking)."""

    embedder: str = DEFAULT_EMBEDDER
    chunking: Chunking = "sentences"
    size: int = _bounded(200, 8)
    overlap: int = _bounded(20, 0)
    big_size: int = _bounded(256, 8)
    window: int = _bounded(1, 0)
    headers: bool = True
    late: bool = False

    def chunker(self) -> Chunker:
        """The chunker of these settings. Raises ConfigError for sizes that contradict each other."""
        if self.chunking == "small-to-big":
            return SmallToBigChunker(self.size, self.big_size, self.headers)
        if self.chunking == "sliding-window":
            return SlidingWindowChunker(self.size, self.window, self.headers)
        border: Literal["sentence", "token"] = "sentence" if self.chunking == "sentences" else "token"
        return SplitChunker(self.size, self.overlap, border, self.headers)


@dataclass(frozen=True)
class RetrieveStep:
    """What is asked for, by which method; `alpha` weighs sparse scores in the fusion S = alpha · sparse + dense.

    `lexical`: BM25 by postings of our own in memory, by the store's full text (LanceDB), for corpora
    beyond memory, or SPLADE by the model in the directory `splade`.
    `sentences`: a passage is as near as the nearest of itself and its sentences, whose vectors indexing then makes too.
    `classify`: questions that need no document are answered without (`mainspring rag classify` trains what decides).
    """

    query: QueryForm = "original"
    method: Method = "hybrid"
    fusion: Fusion = "weighted"
    alpha: float = _bounded(1.0, 0)
    candidates: int = _bounded(50, 1, 1000)
    classify: bool = False
    lexical: Lexical = "postings"
    splade: str = ""
    sentences: bool = False


@dataclass(frozen=True)
class RerankStep:
    """Which reranker reads the first `depth` candidates. `blend` adds so much of the retrieval's score, both scaled."""

    method: RerankMethod = "cross-encoder"
    depth: int = _bounded(20, 1, 1000)
    blend: float = _bounded(0.0, 0)


@dataclass(frozen=True)
class ContextStep:
    """What the generator reads: the best `passages`, in an order, at full length or summarised to `ratio`."""

    passages: int = _bounded(5, 1, 100)
    order: Order = "reverse"
    summary: Summary = "none"
    ratio: float = _bounded(0.5, 0.01, 1)


@dataclass(frozen=True)
class AnswerStep:
    """`abstain_below`: the cross-encoder's score of the best passage under which nothing is answered.

    The default was calibrated on SQuAD (docs/results/rag.md); `generation/abstention.py` finds one for other documents.
    """

    max_tokens: int = _bounded(256, 1)
    abstain_below: float = 1.7


@dataclass(frozen=True)
class Strategy:
    """Every step. `paper_compat` makes the authors' choices where theirs differ from correct ones (fusion.py)."""

    index: IndexStep = IndexStep()
    retrieve: RetrieveStep = RetrieveStep()
    rerank: RerankStep = RerankStep()
    context: ContextStep = ContextStep()
    answer: AnswerStep = AnswerStep()
    paper_compat: bool = False


RECIPES: Mapping[str, Strategy] = MappingProxyType(
    {
        "default": Strategy(),
        "best": Strategy(
            retrieve=RetrieveStep(query="hyde-with-query", alpha=PAPER_ALPHA),
            rerank=RerankStep("cross-encoder", depth=20),
            context=ContextStep(order="reverse", summary="recomp"),
        ),
        "balanced": Strategy(
            retrieve=RetrieveStep(alpha=PAPER_ALPHA),
            rerank=RerankStep("precomputed", depth=50),
            context=ContextStep(order="reverse", summary="recomp"),
        ),
        "fast": Strategy(rerank=RerankStep("none")),
        "fine": Strategy(retrieve=RetrieveStep(alpha=0.85, sentences=True), rerank=RerankStep("none")),
    }
)


def load_strategy(source: str | Path) -> Strategy:
    """A recipe by name, or a TOML file of one. Raises RecipeError."""
    known = RECIPES.get(str(source))
    if known is not None:
        return known
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        names = ", ".join(RECIPES)
        raise RecipeError(
            f"{str(source)!r} is no readable strategy file ({error}) and none of: {names}"
        ) from error
    return parse_strategy(text, str(path))


def parse_strategy(text: str, where: str = "strategy") -> Strategy:
    """A strategy from TOML; what is not written has its default. Raises RecipeError that names key, value and limit."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{where} is not valid TOML: {error}") from error
    strategy: Strategy = _build(Strategy, table, where, "")
    return strategy


def to_toml(strategy: Strategy) -> str:
    """The strategy as TOML with every key; `parse_strategy` gives the same value back."""
    steps = dataclasses.asdict(strategy)
    lines = [f"{key} = {toml_literal(value)}" for key, value in steps.items() if not isinstance(value, dict)]
    for name, step in steps.items():
        if isinstance(step, dict):
            lines += ["", f"[{name}]", *(f"{key} = {toml_literal(value)}" for key, value in step.items())]
    return "\n".join(lines) + "\n"


def toml_literal(value: bool | int | float | str) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    return repr(value)


def _build(cls: type[Any], table: Mapping[str, Any], where: str, prefix: str) -> Any:
    hints = get_type_hints(cls)
    fields = {item.name: item for item in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = prefix + key
        if key not in hints:
            near = difflib.get_close_matches(key, list(hints), n=1, cutoff=0.5)
            hint = f"did you mean {prefix + near[0]!r}?" if near else f"known here: {', '.join(hints)}"
            raise RecipeError(f"{where}: unknown key {name!r}; {hint}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise RecipeError(f"{where}: {name} must be a table ([{name}]), not {value!r}")
            values[key] = _build(hints[key], value, where, f"{name}.")
        else:
            values[key] = _checked(hints[key], value, fields[key].metadata, where, name)
    return cls(**values)


def _checked(kind: Any, value: Any, limits: Mapping[str, float], where: str, name: str) -> Any:
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            choices = ", ".join(map(repr, get_args(kind)))
            raise RecipeError(f"{where}: {name} = {value!r} must be one of {choices}")
        return value
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise RecipeError(f"{where}: {name} = {value!r} must be of type {kind.__name__}")
    if kind in (int, float) and not limits.get("low", -math.inf) <= value <= limits.get("high", math.inf):
        low, high = limits.get("low", -math.inf), limits.get("high", math.inf)
        raise RecipeError(f"{where}: {name} = {value} must lie between {low:g} and {high:g}")
    return value
