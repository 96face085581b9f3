"""Reads a recipe from TOML. A wrong key names itself and its nearest valid one; a wrong value names its limit."""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mainspring.errors import RecipeError
from mainspring.train.recipe import Recipe

_Table = TypeVar("_Table")
_TYPE_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a TOML file, with `section.key=value` overrides (values in TOML's syntax) put in.

    Raises RecipeError for an unreadable file, bad TOML, an unknown key, a wrong type or range, and for
    settings that contradict each other.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}. Give the path of a TOML file.") from error
    return parse_recipe(text, where=str(path), overrides=overrides)


def parse_recipe(text: str, where: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """Like load_recipe, from the TOML text itself; `where` names it in messages."""
    recipe = build_table(Recipe, parse_toml(text, where, overrides), where)
    _check_consistency(recipe, where)
    return recipe


def parse_toml(text: str, where: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The tables of a TOML text, with the overrides put in. Raises RecipeError."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{where} is not valid TOML: {error}") from error
    for override in overrides:
        _put(table, override)
    return table


def build_table(cls: type[_Table], table: Mapping[str, Any], where: str) -> _Table:
    """A frozen dataclass of settings from a TOML table, nested ones from nested tables. Raises RecipeError."""
    built: _Table = _build(cls, table, where, prefix="")
    return built


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain JSON-able values."""
    return dataclasses.asdict(recipe)


def recipe_from_dict(table: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Inverse of recipe_to_dict, with the same checks as a file."""
    recipe: Recipe = _build(Recipe, _without_none(table), where, prefix="")
    _check_consistency(recipe, where)
    return recipe


def _without_none(table: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, Mapping) else value
        for key, value in table.items()
        if value is not None
    }


def _put(table: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(
            f"--set {override!r}: write it as section.key=value, for example training.max_steps=100"
        )
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value  # a bare word is a string: --set data.sources would need a list, a name does not need quotes
    *sections, last = [part.strip() for part in key.split(".")]
    for section in sections:
        nested = table.setdefault(section, {})
        if not isinstance(nested, dict):
            raise RecipeError(f"--set {override!r}: {section!r} is a value, not a table")
        table = nested
    table[last] = parsed


def _build(cls: type[Any], table: Mapping[str, Any], where: str, prefix: str) -> Any:
    """One dataclass from one TOML table; nested dataclasses from nested tables."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in fields:
            raise RecipeError(_unknown_key_message(cls, key, where, prefix))
        hint, name = hints[key], prefix + key
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise RecipeError(f"{where}: {name} must be a table ([{name}]), not {value!r}")
            values[key] = _build(hint, value, where, prefix=f"{name}.")
        else:
            values[key] = _convert(hint, value, where, name)
            _check_range(values[key], fields[key].metadata, where, name)
    return cls(**values)


def _unknown_key_message(cls: type[Any], key: str, where: str, prefix: str) -> str:
    names = [field.name for field in dataclasses.fields(cls)]
    nearest = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    if nearest:
        return f"{where}: unknown key {prefix + key!r}; did you mean {prefix + nearest[0]!r}?"
    elsewhere = [
        f"{section.name}.{key}"
        for section in dataclasses.fields(Recipe)
        if dataclasses.is_dataclass(section.default)
        and key in {f.name for f in dataclasses.fields(section.default)}
    ]
    if elsewhere:
        return f"{where}: unknown key {prefix + key!r}; did you mean {elsewhere[0]!r}?"
    table = f"[{prefix[:-1]}]" if prefix else "the recipe"
    return f"{where}: unknown key {prefix + key!r}; {table} takes: {', '.join(sorted(names))}"


def _convert(hint: Any, value: Any, where: str, name: str) -> Any:
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        inner = [choice for choice in get_args(hint) if choice is not NoneType]
        return _convert(inner[0], value, where, name)
    if origin is Literal:
        choices = get_args(hint)
        if value not in choices:
            near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
            hint_text = f" Did you mean {near[0]!r}?" if near else ""
            raise RecipeError(
                f"{where}: {name} = {value!r} must be one of {', '.join(map(repr, choices))}.{hint_text}"
            )
        return value
    if origin is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str):
            items = _TYPE_NAMES[get_args(hint)[0]].split()[-1]
            raise RecipeError(f"{where}: {name} = {value!r} must be a list of {items}s")
        return tuple(
            _convert(get_args(hint)[0], item, where, f"{name}[{number}]") for number, item in enumerate(value)
        )
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise RecipeError(f"{where}: {name} = {value!r} must be {_TYPE_NAMES[hint]}")
    return value


def _check_range(value: Any, metadata: Mapping[str, Any], where: str, name: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{where}: {name} = {value} must be a finite number")
    low, high = metadata.get("low"), metadata.get("high")
    if low is not None and value < low:
        raise RecipeError(f"{where}: {name} = {value} is too small; the least is {low:g}")
    if high is not None and value > high:
        raise RecipeError(f"{where}: {name} = {value} is too large; the most is {high:g}")


def _check_consistency(recipe: Recipe, where: str) -> None:
    """Settings that are each valid but contradict each other."""
    if not recipe.data.sources:
        raise RecipeError(
            f"{where}: data.sources is empty; name at least one text file, directory or tar archive"
        )
    weights = recipe.data.weights
    if weights and (
        len(weights) != len(recipe.data.sources) or not all(0 < weight < math.inf for weight in weights)
    ):
        raise RecipeError(
            f"{where}: data.weights = {list(weights)} must give each of the {len(recipe.data.sources)} data.sources a "
            "number above 0; leave a source out to have none of it"
        )
    training, model = recipe.training, recipe.model
    if training.tokens_per_micro_batch < training.sequence_length:
        raise RecipeError(
            f"{where}: training.tokens_per_micro_batch = {training.tokens_per_micro_batch} is smaller than "
            f"training.sequence_length = {training.sequence_length}; a whole window must fit"
        )
    if model.init_from is not None and recipe.tokenizer.path is not None:
        raise RecipeError(
            f"{where}: tokenizer.path and model.init_from are both set; the model brings its own"
        )
    if model.init_from is None:
        has_experts = model.architecture in ("MixtralForCausalLM", "Qwen3MoeForCausalLM")
        if has_experts != bool(model.num_experts):
            raise RecipeError(
                f"{where}: model.num_experts = {model.num_experts} with model.architecture = "
                f"{model.architecture!r}; Mixtral and Qwen3Moe have experts, the others none"
            )
        if model.head_dim is None and model.hidden_size % model.num_heads:
            raise RecipeError(
                f"{where}: model.hidden_size = {model.hidden_size} is no multiple of model.num_heads = "
                f"{model.num_heads}; change one, or set model.head_dim"
            )
        head_dim = model.head_dim or model.hidden_size // model.num_heads
        if head_dim % 2:
            raise RecipeError(
                f"{where}: the head dimension {head_dim} is odd; rotary embedding needs an even one"
            )
        kv_heads = model.num_kv_heads or model.num_heads
        if model.num_heads % kv_heads:
            raise RecipeError(
                f"{where}: model.num_heads = {model.num_heads} is no multiple of model.num_kv_heads = {kv_heads}"
            )
        if (
            model.max_position_embeddings is not None
            and model.max_position_embeddings < training.sequence_length
        ):
            raise RecipeError(
                f"{where}: model.max_position_embeddings = {model.max_position_embeddings} is smaller than "
                f"training.sequence_length = {training.sequence_length}"
            )
    if recipe.evaluation.stride is not None and recipe.evaluation.stride > training.sequence_length:
        raise RecipeError(
            f"{where}: evaluation.stride = {recipe.evaluation.stride} is larger than training.sequence_length = "
            f"{training.sequence_length}; a window predicts at most its own length"
        )
    if recipe.evaluation.every and not recipe.data.holdout_fraction:
        raise RecipeError(
            f"{where}: evaluation.every is set but data.holdout_fraction is 0; hold out a part of each text"
        )
