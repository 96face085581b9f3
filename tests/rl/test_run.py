"""A run from its recipe: what it writes, that it resumes to the bit, and what it refuses before anything is lost."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mainspring.cli.main import app
from mainspring.errors import CheckpointError, ConfigError, MainspringError, RecipeError
from mainspring.model.checkpoint import load_model
from mainspring.rl.grpo import DAPO
from mainspring.rl.recipe import RlRecipe
from mainspring.rl.run import RlResult, RlRun
from mainspring.train.metrics import Progress
from rl.small_runs import RECIPE, lines, prepare, recipe


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return prepare(tmp_path)


def run(settings: RlRecipe, **more: bool) -> RlResult:
    return RlRun(settings, show=Progress(silent=True), **more).run()


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "grpo", "gspo", "vapo"])
def test_a_run_leaves_a_model_metrics_and_validations(folder: Path, algorithm: str) -> None:
    result = run(recipe(folder, algorithm))
    assert (result.step, result.interrupted) == (4, False)
    assert result.validation is not None
    trained, start = load_model(folder / "out" / "latest"), load_model(folder / "model")
    assert not torch.equal(trained.embedding, start.embedding)
    records = lines(folder / "out" / "metrics.jsonl")
    assert [r["step"] for r in records if r["event"] == "step"] == [1, 2, 3, 4]
    assert [r["step"] for r in records if r["event"] == "validation"] == [0, 4]
    if algorithm in ("grpo", "gspo", "vapo"):
        steps = [r for r in records if r["event"] == "step"]
        assert all(r["max_delta"] == 0 for r in steps)
        assert all(r["rollout_tokens_per_second"] > 0 and r["update_tokens_per_second"] > 0 for r in steps)
        groups = lines(folder / "out" / "rollouts.jsonl")
        assert [len(g["answers"]) for g in groups] == [3] * 12
        assert all(0 <= a["reward"] <= 1 for g in groups for a in g["answers"])


@pytest.mark.parametrize(
    ("algorithm", "change"),
    [("grpo", "engine.ahead=true"), ("grpo", "lora.rank=2"), ("vapo", "rollouts.slice_tokens=4")],
)
def test_a_run_that_is_resumed_ends_at_the_same_bits(folder: Path, algorithm: str, change: str) -> None:
    run(recipe(folder, algorithm, change, f"output={str(folder / 'whole')!r}"))
    through = recipe(folder, algorithm, change)
    stopped = RlRun(through, show=Progress(silent=True))
    steps = stopped._steps  # stop it after two steps as a signal would
    stopped._steps = lambda: islice(steps(), 2)
    assert stopped.run().interrupted
    result = run(through, resume=True)
    assert result.step == 4
    whole, parts = load_model(folder / "whole" / "latest"), load_model(folder / "out" / "latest")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))
    groups = [lines(folder / name / "rollouts.jsonl") for name in ("whole", "out")]
    assert groups[0] == groups[1]


def test_a_recipe_chooses_the_loss_of_pairs_and_whether_there_is_a_reference(folder: Path) -> None:
    losses = {}
    for change in ("beta=0.1", "beta=0.3", "loss='ipo'", "reference_free=true", "mean_log_probs=true"):
        run(recipe(folder, "dpo", f"dpo.{change}", "dpo.max_steps=2"), restart=True)
        records = lines(folder / "out" / "metrics.jsonl")
        losses[change] = [r["loss"] for r in records if r["event"] == "step"]
        held_out = [r for r in records if r["event"] == "validation"]
        # Before the first step the model is the reference, if there is one.
        assert (held_out[0]["margin"] == pytest.approx(0, abs=1e-5)) == (change != "reference_free=true")
    assert losses["beta=0.1"][0] == pytest.approx(math.log(2))
    assert losses["loss='ipo'"][0] == pytest.approx(25.0)  # (0 - 1 / (2 · 0.1))²
    assert len({round(found[1], 6) for found in losses.values()}) == 5


def test_a_malformed_line_of_prompts_is_named_and_nothing_is_begun(folder: Path) -> None:
    file = folder / "train.jsonl"
    file.write_text(file.read_text() + '{"prompt": "1+1="\n')
    with pytest.raises(ConfigError, match=r"train\.jsonl, line 9: "):
        run(recipe(folder))
    assert not (folder / "out").exists()


def test_a_reward_that_fails_costs_its_samples_and_past_the_limit_the_run(folder: Path) -> None:
    function = 'reward.function="rl.reward_functions:often_raises"'
    run(recipe(folder, "grpo", function))
    steps = [r for r in lines(folder / "out" / "metrics.jsonl") if r["event"] == "step"]
    assert sum(r["dropped"] for r in steps) > 0
    assert steps[-1]["reward_failures"] >= sum(r["dropped"] for r in steps)
    with pytest.raises(MainspringError, match="more than max_failures = 1"):
        run(recipe(folder, "grpo", function, "reward.max_failures=1"), restart=True)


def test_a_checkpoint_of_another_algorithm_or_model_is_refused(folder: Path) -> None:
    run(recipe(folder, "grpo"))
    with pytest.raises(CheckpointError, match="written by a run with algorithm = 'grpo', not 'vapo'"):
        run(recipe(folder, "vapo"), resume=True)
    with pytest.raises(CheckpointError, match=r"model\.path = '.*/model', not 'smollm2'"):
        run(recipe(folder, "grpo", "model.path='smollm2'"), resume=True)
    with pytest.raises(ConfigError, match="holds a run at step 4"):
        run(recipe(folder, "grpo"))
    state = folder / "out" / "latest" / "optimizer" / "state.json"
    state.write_text(state.read_text().replace('"carried"', '"carted"'))
    with pytest.raises(CheckpointError, match="cannot read the state of a post-training run"):
        run(recipe(folder, "grpo"), resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("algorithm='dappo'",), "'dappo'.*Did you mean 'dapo'"),
        (("grpo.max_step=3",), r"unknown key 'grpo\.max_step'; did you mean 'grpo\.max_steps'"),
        (("data.gym_task='chain_sum'",), "either data.train"),
        (("lora.rank=4", "engine.ahead=true"), "adapters are trained only where"),
        (("engine.ray_workers=2", "engine.ahead=true"), "engine.ahead and engine.ray_workers exclude"),
        (("rollouts.group_size='many'",), r"rollouts\.group_size = 'many' must be an integer"),
    ],
)
def test_a_recipe_that_is_wrong_says_what_would_be_right(
    folder: Path, changes: tuple[str, ...], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(folder, "grpo", *changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.stop=['stop']", "which is 4 tokens"),
        ("reward.function='nowhere:f'", "cannot be imported"),
        ("reward.function='f'", "module:name"),
        ("rollouts.max_tokens=61", "the model's context is 64"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(folder: Path, change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(recipe(folder, "grpo", change))


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is not there")
def test_a_device_that_is_not_there_is_named_by_its_key(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.device = 'cuda', but PyTorch sees no CUDA device"):
        run(recipe(folder, "grpo", "model.device='cuda'"))


def test_presets_are_what_a_recipe_changes(folder: Path) -> None:
    found = recipe(folder, "dapo").grpo
    assert found == replace(DAPO, max_steps=4, mini_batches=2)


def test_the_command_trains_and_shows_what_was_written(folder: Path) -> None:
    path = folder / "recipe.toml"
    path.write_text(RECIPE.format(folder=folder, algorithm="grpo"))
    runner = CliRunner()
    trained = runner.invoke(app, ["rl", str(path), "--set", "grpo.max_steps=1"])
    assert trained.exit_code == 0, trained.output
    shown = runner.invoke(app, ["rl", "view", str(folder / "out"), "--step", "1"])
    assert shown.exit_code == 0
    assert shown.output.count("step 1") == 3
    assert "reward" in shown.output
    assert "reference: " in shown.output
    none = runner.invoke(app, ["rl", "view", str(folder / "out"), "--step", "2"])
    assert none.output.strip() == ""
    missing = runner.invoke(app, ["rl", "view", str(folder / "nowhere")])
    assert isinstance(missing.exception, ConfigError)
