"""A recipe says clearly what is wrong with it."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from mainspring.errors import RecipeError
from mainspring.rl.recipe import load_rl_recipe
from mainspring.train.recipe_file import load_recipe, parse_recipe, recipe_from_dict, recipe_to_dict

_DATA = '[data]\nsources = ["a.txt"]\n'


def test_values_and_defaults_are_read() -> None:
    recipe = parse_recipe(_DATA + "[training]\nmax_steps = 7\nclip_norm = 2\n")
    assert recipe.training.max_steps == 7
    assert recipe.training.clip_norm == 2.0
    assert isinstance(recipe.training.clip_norm, float)
    assert recipe.data.sources == ("a.txt",)
    assert recipe.training.accumulation_steps == 1


def test_dictionary_round_trip() -> None:
    recipe = parse_recipe(_DATA + '[optimizer]\nname = "muon"\n[samples]\nprompts = ["x", "y"]\n')
    assert recipe_from_dict(recipe_to_dict(recipe)) == recipe


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            _DATA + "[training]\nmax_stesp = 3\n",
            ["'training.max_stesp'", "did you mean 'training.max_steps'"],
        ),
        (_DATA + "[trainning]\nmax_steps = 3\n", ["'trainning'", "did you mean 'training'"]),
        (_DATA + "[training]\nhidden_size = 3\n", ["'training.hidden_size'", "'model.hidden_size'"]),
        (_DATA + "[training]\nzzz = 3\n", ["'training.zzz'", "[training] takes:", "max_steps"]),
        (_DATA + '[training]\nmax_steps = "3"\n', ["training.max_steps = '3'", "an integer"]),
        (_DATA + "[training]\nmax_steps = true\n", ["training.max_steps = True", "an integer"]),
        (_DATA + "[training]\nmax_steps = 0\n", ["training.max_steps = 0", "too small", "least is 1"]),
        (_DATA + "[optimizer]\nbeta1 = 1.5\n", ["optimizer.beta1 = 1.5", "too large", "0.9999"]),
        (_DATA + "[optimizer]\nlr = nan\n", ["optimizer.lr", "finite"]),
        (
            _DATA + '[optimizer]\nname = "adam"\n',
            ["optimizer.name = 'adam'", "'adamw', 'muon'", "Did you mean 'adamw'"],
        ),
        (_DATA + "training = 3\n", ["unknown key 'data.training'"]),
        ("training = 3\n" + _DATA, ["training must be a table"]),
        ('[data]\nsources = "a.txt"\n', ["data.sources = 'a.txt'", "list of strings"]),
        ("", ["data.sources is empty"]),
        (
            _DATA + "[training]\nsequence_length = 512\ntokens_per_micro_batch = 256\n",
            ["256", "512", "must fit"],
        ),
        (_DATA + "[model]\nhidden_size = 100\nnum_heads = 3\n", ["hidden_size = 100", "num_heads = 3"]),
        (_DATA + "[model]\nnum_heads = 4\nnum_kv_heads = 3\n", ["num_heads = 4", "num_kv_heads = 3"]),
        (_DATA + "[evaluation]\nevery = 10\n", ["holdout_fraction is 0"]),
        ("[data\n", ["not valid TOML"]),
    ],
)
def test_what_is_wrong_is_named(text: str, parts: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, where="r.toml")
    message = str(caught.value)
    assert message.startswith("r.toml")
    for part in parts:
        assert part in message


def test_overrides_replace_values_and_are_checked() -> None:
    overrides = ["training.max_steps=5", "output=somewhere", 'data.sources=["b.txt"]']
    recipe = parse_recipe(_DATA, overrides=overrides)
    assert (recipe.training.max_steps, recipe.output, recipe.data.sources) == (5, "somewhere", ("b.txt",))
    with pytest.raises(RecipeError, match=r"training\.max_step.*did you mean"):
        parse_recipe(_DATA, overrides=["training.max_step=5"])
    with pytest.raises(RecipeError, match=r"section\.key=value"):
        parse_recipe(_DATA, overrides=["training.max_steps"])


def test_an_unreadable_file_is_a_recipe_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        load_recipe(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        load_recipe(tmp_path / "binary.toml")


def test_every_shipped_recipe_is_valid() -> None:
    recipes = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
    assert recipes
    for path in recipes:
        text = path.read_text(encoding="utf-8")
        (load_rl_recipe if tomllib.loads(text).get("algorithm") else load_recipe)(path)
