"""Runs: from texts to a checkpoint, stopped and continued bit for bit, with clear refusals."""

from __future__ import annotations

import filecmp
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mainspring.errors import CheckpointError, ConfigError, MainspringError, RecipeError
from mainspring.model.checkpoint import load_model
from mainspring.train.checkpoint import checkpoints
from mainspring.train.recipe import Recipe
from mainspring.train.recipe_file import parse_recipe
from mainspring.train.trainer import Trainer, TrainingResult

_TEXT = "".join(
    f"The {i}th line of {i * i % 89} says that {i % 7} follows {i % 11}, and so on.\n" for i in range(300)
)
_RECIPE = """
name = "tiny"
seed = 5
[data]
sources = ["texts"]
holdout_fraction = 0.1
[tokenizer]
vocab_size = 300
[model]
architecture = "Qwen3ForCausalLM"
hidden_size = 32
intermediate_size = 48
num_layers = 2
num_heads = 2
[training]
sequence_length = 24
tokens_per_micro_batch = 96
accumulation_steps = 2
max_steps = 20
log_every = 4
[optimizer]
name = "muon"
lr = 0.01
"""


@pytest.fixture(autouse=True)
def _in_a_directory_with_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(_TEXT)
    (tmp_path / "texts" / "b.txt").write_text(_TEXT[::-1])


def _recipe(*overrides: str) -> Recipe:
    return parse_recipe(_RECIPE, overrides=overrides)


def _run(*overrides: str, resume: bool = False, restart: bool = False) -> TrainingResult:
    return Trainer(_recipe(*overrides), resume=resume, restart=restart).run()


def _events(output: str, event: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in Path(output, "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def _same_files(a: Path, b: Path) -> bool:
    names = ("model.safetensors", "optimizer/model.safetensors", "tokenizer.json")
    return all(filecmp.cmp(a / name, b / name, shallow=False) for name in names)


def test_a_run_learns_and_leaves_a_checkpoint_that_transformers_loads() -> None:
    result = _run(
        "output=out", "training.max_steps=60", 'samples.prompts=["The ", "5"]', "samples.max_tokens=8"
    )
    losses = [line["loss"] for line in _events("out", "step")]
    assert losses[-1] < losses[0] - 1.0
    assert result.evaluation is not None
    assert result.evaluation.num_bytes == 2 * int(len(_TEXT) * 0.1)
    assert len(result.samples) == 2
    assert Path("out/latest").resolve() == result.checkpoint.resolve()
    ours = load_model("out/latest", numerics="fast")
    theirs = AutoModelForCausalLM.from_pretrained("out/latest", dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained("out/latest")(_TEXT[:60], return_tensors="pt")["input_ids"]
    log_probs = theirs(tokens).logits.log_softmax(-1)[0, :-1].gather(-1, tokens[0, 1:, None])[:, 0]
    torch.testing.assert_close(ours.log_probs([tokens[0].tolist()])[0], log_probs, rtol=1e-4, atol=1e-4)
    assert {"step", "loss", "tokens_per_second", "mfu", "eta", "grad_norm"} <= _events("out", "step")[
        0
    ].keys()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(dtype: str, optimizer: str) -> None:
    settings = [f"training.dtype={dtype}", f"optimizer.name={optimizer}"]
    whole = _run("output=whole", *settings)
    stopped = Trainer(_recipe("output=parts", *settings))
    _stop_after(stopped, 10)
    interrupted = stopped.run()
    assert (interrupted.step, interrupted.interrupted) == (10, True)
    torch.manual_seed(123)  # whatever happened to the random state in between must not matter
    resumed = _run("output=parts", *settings, resume=True)
    assert (resumed.step, whole.step) == (20, 20)
    assert _same_files(whole.checkpoint, resumed.checkpoint)
    assert resumed.evaluation == whole.evaluation


def _stop_after(trainer: Trainer, steps: int) -> None:
    """Sends this process the Ctrl-C of a user once `steps` steps are done."""
    original = trainer._train_step

    def step_and_interrupt(*args: object) -> float:
        norm = original(*args)
        if trainer._step == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return norm

    trainer._train_step = step_and_interrupt


def test_interrupting_leaves_handlers_as_they_were() -> None:
    before = signal.getsignal(signal.SIGINT)
    trainer = Trainer(_recipe("output=out"))
    _stop_after(trainer, 3)
    assert trainer.run().step == 3
    assert signal.getsignal(signal.SIGINT) is before


def test_a_killed_run_resumes_from_its_last_checkpoint() -> None:
    whole = _run("output=whole", "checkpoint.every=6")
    trainer = Trainer(_recipe("output=killed", "checkpoint.every=6"))
    original = trainer._train_step

    def die_at_step_9(*args: object) -> float:
        if trainer._step == 8:
            raise MemoryError("the machine is gone")
        return original(*args)

    trainer._train_step = die_at_step_9
    with pytest.raises(MemoryError):
        trainer.run()
    assert [step for step, _ in checkpoints(Path("killed"))] == [6]
    assert [line["step"] for line in _events("killed", "step")] == [4, 8]
    resumed = _run("output=killed", "checkpoint.every=6", resume=True)
    assert _same_files(whole.checkpoint, resumed.checkpoint)
    # What the killed run had logged after step 6 was done again, and stands in the file once.
    assert [line["step"] for line in _events("killed", "step")] == [4, 8, 12, 16, 20]


def test_old_checkpoints_go_and_the_newest_stay() -> None:
    _run("output=out", "checkpoint.every=4", "checkpoint.keep=2")
    assert [step for step, _ in checkpoints(Path("out"))] == [16, 20]
    assert sorted(p.name for p in Path("out").iterdir()) == [
        "data",
        "latest",
        "metrics.jsonl",
        "step-00000016",
        "step-00000020",
    ]


def test_a_time_budget_ends_the_run_with_its_schedule_complete() -> None:
    result = _run(
        "output=out", "training.max_steps=1000000", "training.max_seconds=2.0", "training.log_every=1"
    )
    factors = [line["lr_factor"] for line in _events("out", "step")]
    assert not result.interrupted
    assert result.step == len(factors) < 1_000_000
    assert min(factors[-3:]) < 0.2 < max(factors)


def test_evaluations_on_the_way_are_recorded() -> None:
    _run("output=out", "evaluation.every=8", "training.max_steps=16")
    assert [line["step"] for line in _events("out", "evaluation")] == [8, 16]


def test_training_continues_from_another_model() -> None:
    first = _run("output=first", "training.max_steps=60")
    again = _run(
        "output=second", "model.init_from=first/latest", "training.max_steps=4", "optimizer.muon_lr=0.001"
    )
    assert first.evaluation is not None
    assert again.evaluation is not None
    assert again.evaluation.bits_per_byte < first.evaluation.bits_per_byte + 0.2
    assert filecmp.cmp("first/latest/tokenizer.json", "second/latest/tokenizer.json", shallow=False)


def test_an_existing_run_is_neither_continued_nor_deleted_unasked() -> None:
    _run("output=out", "training.max_steps=2")
    with pytest.raises(ConfigError, match=r"holds a run at step 2.*--resume.*--restart"):
        _run("output=out")
    assert _run("output=out", "training.max_steps=3", resume=True).step == 3
    assert _run("output=out", "training.max_steps=1", restart=True).step == 1
    assert [step for step, _ in checkpoints(Path("out"))] == [1]
    with pytest.raises(ConfigError, match="no checkpoint in"):
        _run("output=elsewhere", resume=True)


def test_resuming_with_other_texts_or_another_optimizer_is_refused() -> None:
    _run("output=out", "training.max_steps=2")
    with pytest.raises(CheckpointError, match="optimizer state"):
        _run("output=out", "optimizer.name=adamw", resume=True)
    Path("texts/a.txt").write_text("something else " * 100)
    with pytest.raises(
        CheckpointError, match="texts, their weights or the tokenizer's settings have changed"
    ):
        _run("output=out", resume=True)


def test_a_diverging_run_stops_and_says_what_to_do() -> None:
    said = r"step \d+: the loss is .*first to be not finite is the (output|weight) .*Lower optimizer\.lr"
    with pytest.raises(MainspringError, match=said):
        _run("output=out", "optimizer.name=adamw", "optimizer.lr=10.0", "training.clip_norm=0", "model.init_std=1.0",
             "optimizer.eps=1e-16", "training.max_steps=400", "training.dtype=bfloat16", "data.holdout_fraction=0.0",
             "optimizer.weight_decay=10.0")  # fmt: skip
    assert checkpoints(Path("out")) == []


def test_bad_data_leaves_nothing_behind() -> None:
    Path("texts/a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match=r"a\.txt: byte 0"):
        _run("output=out")
    assert not Path("out/data").exists()


def test_shards_are_made_once_for_the_same_texts() -> None:
    _run("output=out", "training.max_steps=1")
    made = Path("out/data/train-00000.tokens").stat().st_mtime_ns
    _run("output=out", "training.max_steps=2", resume=True)
    assert Path("out/data/train-00000.tokens").stat().st_mtime_ns == made
    _run("output=out", "training.max_steps=1", "tokenizer.vocab_size=310", restart=True)
    assert Path("out/data/train-00000.tokens").stat().st_mtime_ns != made


def test_ctrl_c_stops_the_command_with_a_checkpoint() -> None:
    Path("recipe.toml").write_text(_RECIPE.replace("max_steps = 20", "max_steps = 1000000"))
    program = "import typer; from mainspring.cli.train import train; app = typer.Typer(); app.command()(train); app()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "recipe.toml", "--output", "out", "--set", "training.threads=1"],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not (
            Path("out/metrics.jsonl").exists() and '"event": "step"' in Path("out/metrics.jsonl").read_text()
        ):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "continue with --resume" in errors
    assert "Traceback" not in errors
    ((step, path),) = checkpoints(Path("out"))
    assert step > 0
    load_model(path)
