"""Checkpoints are written beside the training loop: it goes on meanwhile, and learns of a write that failed."""

from __future__ import annotations

import filecmp
import json
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from mainspring.errors import CheckpointError
from mainspring.formats.safetensors_file import CheckpointReader
from mainspring.formats.safetensors_writer import _SliceWriter
from mainspring.train.background import BackgroundWriter
from mainspring.train.checkpoint import checkpoints
from mainspring.train.metrics import Progress
from mainspring.train.recipe_file import parse_recipe
from mainspring.train.trainer import Trainer

_RECIPE = """
seed = 5
[data]
sources = ["{texts}"]
[tokenizer]
vocab_size = 270
[model]
hidden_size = 16
intermediate_size = 24
num_layers = 2
num_heads = 2
[training]
sequence_length = 24
tokens_per_micro_batch = 48
max_steps = 8
log_every = 2
threads = 1
[checkpoint]
every = 2
keep = 9
[schedule]
kind = "constant"
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "a.txt").write_text("".join(f"line {i} of {i * i % 89}\n" for i in range(200)))
    return _RECIPE.format(texts=tmp_path / "a.txt")


def _trainer(recipe: str, output: Path, *overrides: str, resume: bool = False) -> Trainer:
    settings = parse_recipe(recipe, overrides=[f"output='{output}'", *overrides])
    return Trainer(settings, resume=resume, show=Progress(silent=True))


def _steps(output: Path) -> list[int]:
    return [step for step, _ in checkpoints(output)]


def _after_step(trainer: Trainer, action: Callable[[int], None]) -> None:
    whole = trainer._train_step

    def step(*arguments: Any) -> float:
        norm = whole(*arguments)
        action(trainer._step)
        return norm

    trainer._train_step = step


def test_training_goes_on_while_a_checkpoint_is_written_and_its_values_are_those_of_its_step(
    recipe: str, tmp_path: Path
) -> None:
    _trainer(recipe, tmp_path / "plain", "checkpoint.background=false").run()
    gate = threading.Event()
    whole = _SliceWriter._pwrite

    def gated(self: _SliceWriter, *arguments: Any) -> None:
        assert gate.wait(60)
        whole(self, *arguments)

    seen: dict[int, list[int]] = {}

    def at_step(step: int) -> None:
        seen[step] = _steps(tmp_path / "beside")
        if step == 4:  # two steps after the first save began; the next one waits for it
            gate.set()

    trainer = _trainer(recipe, tmp_path / "beside")
    _after_step(trainer, at_step)
    with patch.object(_SliceWriter, "_pwrite", gated):
        trainer.run()
    assert seen[4] == []
    assert _steps(tmp_path / "beside") == _steps(tmp_path / "plain") == [2, 4, 6, 8]
    for step in (2, 4, 6, 8):
        for name in ("model.safetensors", "optimizer/model.safetensors"):
            a, b = (tmp_path / run / f"step-{step:08d}" / name for run in ("plain", "beside"))
            assert filecmp.cmp(a, b, shallow=False), (step, name)
    events = [json.loads(line) for line in (tmp_path / "beside" / "metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "checkpoint"] == [2, 4, 6, 8]


def test_a_write_that_fails_stops_the_run_at_the_next_step_and_older_checkpoints_stay(
    recipe: str, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    trainer = _trainer(recipe, output, "training.max_steps=1000")
    whole = _SliceWriter._pwrite

    def full(self: _SliceWriter, *arguments: Any) -> None:
        if "step-00000004" in str(self.directory):
            raise CheckpointError("cannot write: no space left on device")
        whole(self, *arguments)

    with (
        patch.object(_SliceWriter, "_pwrite", full),
        pytest.raises(CheckpointError, match="no space left"),
    ):
        trainer.run()
    assert trainer._step < 1000
    assert _steps(output) == [2]
    assert not list(output.glob(".*.partial"))
    assert (output / "latest").resolve() == (output / "step-00000002").resolve()


def test_an_error_of_the_loop_lets_the_write_in_flight_finish(recipe: str, tmp_path: Path) -> None:
    trainer = _trainer(recipe, tmp_path / "out")

    def fail(step: int) -> None:
        if step == 3:
            raise MemoryError("the machine is gone")

    _after_step(trainer, fail)
    with pytest.raises(MemoryError):
        trainer.run()
    assert _steps(tmp_path / "out") == [2]


def _die_in_a_write(recipe: str, output: str) -> None:
    """Trains; SIGKILL comes in the middle of the third checkpoint."""
    trainer = _trainer(recipe, Path(output))
    whole = _SliceWriter._pwrite

    def deadly(self: _SliceWriter, *arguments: Any) -> None:
        if "step-00000006" in str(self.directory):
            os.kill(os.getpid(), signal.SIGKILL)
        whole(self, *arguments)

    with patch.object(_SliceWriter, "_pwrite", deadly):
        trainer.run()


def test_a_process_killed_in_the_middle_of_a_write_loses_what_came_after_the_last_complete_checkpoint(
    recipe: str, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "parallel.jobs"])  # as the pool's
    process = context.Process(target=_die_in_a_write, args=(recipe, str(output)))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert _steps(output) == [2, 4]
    assert list(output.glob(".step-*.partial"))
    CheckpointReader(output / "step-00000004" / "optimizer")
    _trainer(recipe, output, resume=True).run()
    _trainer(recipe, tmp_path / "whole").run()
    assert not list(output.glob(".step-*.partial"))
    for name in ("model.safetensors", "optimizer/model.safetensors"):
        a, b = (folder / "step-00000008" / name for folder in (output, tmp_path / "whole"))
        assert filecmp.cmp(a, b, shallow=False)


def test_a_second_write_waits_for_the_first_and_failures_are_told_once() -> None:
    writer = BackgroundWriter()
    assert writer.wait() is None
    gate = threading.Event()
    writer.start(lambda: (gate.wait(), Path("a"))[1])
    assert writer.collect() is None
    with pytest.raises(RuntimeError, match="uncollected"):
        writer.start(lambda: Path("b"))
    waited = []
    assert writer.wait(lambda: (waited.append(1), gate.set())[1]) == Path("a")
    assert waited

    def fail() -> Path:
        raise OSError("no disk")

    writer.start(fail)
    with pytest.raises(OSError, match="no disk"):
        writer.wait()
    assert not writer.failed
    assert writer.wait() is None
