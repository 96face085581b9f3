"""A space of strategies as data: for each step's setting the values that it may have, in the order of the workflow."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from mainspring.errors import RecipeError
from mainspring.rag.strategy import Strategy, parse_strategy, to_toml, toml_literal

Value = bool | int | float | str
_STEPS = ("index", "retrieve", "rerank", "context", "answer")
_MOST = 100_000  # strategies that are drawn of a larger space


@dataclass(frozen=True)
class Choice:
    """A setting, written `step.field`, and its values."""

    key: str
    values: tuple[Value, ...]

    def applied(self, strategy: Strategy, value: Value) -> Strategy:
        """The strategy with this setting at a value, canonical."""
        step, name = self.key.split(".")
        changed = dataclasses.replace(getattr(strategy, step), **{name: value})
        return canonical(dataclasses.replace(strategy, **{step: changed}))

    def value(self, strategy: Strategy) -> Value:
        """What the setting is in a strategy."""
        step, name = self.key.split(".")
        found: Value = getattr(getattr(strategy, step), name)
        return found


@dataclass(frozen=True)
class Space:
    """Every combination of the choices' values."""

    choices: tuple[Choice, ...]

    @property
    def size(self) -> int:
        """How many combinations there are; several may be one strategy."""
        return math.prod(len(choice.values) for choice in self.choices)

    def at(self, index: int, base: Strategy) -> Strategy:
        """The combination of a number in [0, size), on top of the base's other settings."""
        for choice in self.choices:
            index, digit = divmod(index, len(choice.values))
            base = choice.applied(base, choice.values[digit])
        return base

    def shuffled(self, base: Strategy, generator: Random) -> Iterator[Strategy]:
        """Combinations in a random order, each once; of a space beyond 100,000 that many."""
        for index in generator.sample(range(self.size), min(self.size, _MOST)):
            yield self.at(index, base)

    def toml(self) -> str:
        """The space as `load_space` reads it."""
        lines: list[str] = []
        for step in _STEPS:
            mine = [choice for choice in self.choices if choice.key.startswith(f"{step}.")]
            if mine:
                lines += [f"[{step}]", *(f"{c.key.split('.')[1]} = {_array(c.values)}" for c in mine), ""]
        return "\n".join(lines)


def canonical(strategy: Strategy) -> Strategy:
    """Settings that others leave without effect at their defaults: what behaves alike is one value."""
    usual = Strategy()
    index, retrieve, rerank, context = strategy.index, strategy.retrieve, strategy.rerank, strategy.context
    if index.chunking != "small-to-big":
        index = dataclasses.replace(index, big_size=usual.index.big_size)
    if index.chunking != "sliding-window":
        index = dataclasses.replace(index, window=usual.index.window)
    if index.chunking not in ("sentences", "tokens"):
        index = dataclasses.replace(index, overlap=usual.index.overlap)
    if retrieve.method == "bm25":
        retrieve = dataclasses.replace(retrieve, sentences=usual.retrieve.sentences)
    if retrieve.method != "hybrid":
        retrieve = dataclasses.replace(retrieve, fusion=usual.retrieve.fusion)
    if retrieve.method != "hybrid" or retrieve.fusion == "reciprocal-rank":
        retrieve = dataclasses.replace(retrieve, alpha=usual.retrieve.alpha)
    if rerank.method == "none":
        rerank = dataclasses.replace(usual.rerank, method="none")
    if context.summary == "none":
        context = dataclasses.replace(context, ratio=usual.context.ratio)
    return dataclasses.replace(strategy, index=index, retrieve=retrieve, rerank=rerank, context=context)


def default_space(with_model: bool = False, with_index: bool = False, with_answers: bool = False) -> Space:
    """What is searched where the user names no space.

    Forms of the query and summaries by a model if there is one; ways of cutting and embedding if indexes may be made;
    the order of passages and the answer's length if answers are what counts.
    """
    forms: tuple[Value, ...] = ("original", "rewrite", "decompose", "hyde", "hyde-with-query")
    summaries: tuple[Value, ...] = ("none", "extractive-bm25", "extractive-embedding", "recomp")
    cutting = (
        Choice("index.chunking", ("sentences", "small-to-big", "sliding-window")),
        Choice("index.size", (100, 200)),
        Choice("index.headers", (True, False)),
        Choice("index.embedder", ("all-minilm-l6-v2", "bge-small-en-v1.5")),
    )
    answering = (
        Choice("context.order", ("forward", "reverse", "sides")),
        Choice("answer.max_tokens", (32, 64)),
    )
    return Space(
        (
            *(cutting if with_index else ()),
            *((Choice("retrieve.query", forms),) if with_model else ()),
            Choice("retrieve.method", ("hybrid", "bm25", "dense")),
            Choice("retrieve.fusion", ("weighted", "reciprocal-rank")),
            Choice("retrieve.alpha", (0.3, 0.6, 1.0, 1.5)),
            Choice("retrieve.candidates", (20, 50, 100)),
            Choice("rerank.method", ("none", "cross-encoder")),
            Choice("rerank.depth", (5, 10, 20, 50)),
            Choice("rerank.blend", (0.0, 0.1, 0.3)),
            Choice("context.passages", (3, 5, 10)),
            Choice("context.summary", (*summaries, "abstractive") if with_model else summaries),
            Choice("context.ratio", (0.3, 0.5, 0.8)),
            *(answering if with_answers else ()),
        )
    )


def load_space(path: Path, with_index: bool = False) -> Space:
    """A TOML file like a strategy's, with a list of values for each setting.

    Raises RecipeError that names the key, also for a table `index` where no index may be made.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"the space {path} cannot be read: {error}") from error
    choices: list[Choice] = []
    for step in sorted(table, key=lambda name: _STEPS.index(name) if name in _STEPS else len(_STEPS)):
        if step == "index" and not with_index:
            raise RecipeError(
                f"{path}: to search over the table 'index' give --folder, so that indexes can be made"
            )
        if step not in _STEPS or not isinstance(table[step], dict):
            raise RecipeError(f"{path}: {step!r} must be one of the tables {', '.join(_STEPS)}")
        for name, values in table[step].items():
            if not isinstance(values, list) or not values:
                raise RecipeError(f"{path}: {step}.{name} must be a list of values, not {values!r}")
            choices.append(_checked(step, name, values, path))
    if not choices:
        raise RecipeError(f"the space {path} has no setting with values")
    return Space(tuple(choices))


def _checked(step: str, name: str, values: Sequence[Value], path: Path) -> Choice:
    """A choice whose values a strategy accepts, each once."""
    choice = Choice(f"{step}.{name}", tuple(values))
    parsed = [
        parse_strategy(f"[{step}]\n{name} = {_array([value])[1:-1]}", f"{path}: {choice.key}")
        for value in values
    ]
    return Choice(choice.key, tuple(dict.fromkeys(choice.value(strategy) for strategy in parsed)))


def _array(values: Sequence[Value]) -> str:
    return "[" + ", ".join(toml_literal(value) for value in values) + "]"


def changes(strategy: Strategy, base: Strategy) -> str:
    """In which settings a strategy differs from another, in one line."""
    ours, theirs = (tomllib.loads(to_toml(canonical(s))) for s in (strategy, base))
    found = [
        f"{step}.{name} = {toml_literal(value)}"
        for step, settings in ours.items()
        if isinstance(settings, dict)
        for name, value in settings.items()
        if theirs[step][name] != value
    ]
    return ", ".join(found) or "no change"
