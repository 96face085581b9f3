"""`mainspring verify`: starts the ranks, prints the proof, and ends with 1 where gradients differ."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from mainspring.cli.main import app
from mainspring.cli.verify import _show
from mainspring.errors import ConfigError
from mainspring.formats.safetensors_file import CheckpointReader, SafetensorsWriter
from mainspring.parallel.layout import Layout
from mainspring.train.verify import VerifySettings, judge, micro_batches, run_wide_reference
from parallel.conftest import Reference
from parallel.models import tiny
from parallel.pool import Pool

SETTINGS = VerifySettings(steps=2)


def _verify(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mainspring", "verify", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def test_a_sound_layout_is_called_equal(reference: Callable[..., Reference]) -> None:
    known = reference("tied", SETTINGS)
    done = _verify("--model", str(known.directory), "--tp", "2", "--steps", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "layout tp=2: 2 ranks, float32, fast numerics" in done.stdout
    assert "model.layers.3.mlp.down_proj.weight" in done.stdout
    assert "step 1: loss" in done.stdout
    assert "verdict: equal to one device" in done.stdout
    assert "against float64" not in done.stdout


def test_roundings_are_measured_and_allowed_twice_but_no_fault_is(
    pool: Pool, reference: Callable[..., Reference], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In bfloat16 a layout is off by percents of a float64 run, and so is one device; a lost sum is off by more."""
    known = reference("biased", SETTINGS)
    settings = VerifySettings(steps=2, dtype="bfloat16")
    gradients = tmp_path / "gradients.safetensors"
    exact, own = run_wide_reference(known.directory, settings, gradients)
    layout = "tp=2,sequence_parallel=false"
    run, errors = pool.run("jobs:verify", 2, str(known.directory), layout, settings, str(gradients))[0]
    verdict = judge(exact, run, errors, settings, own)
    assert not verdict.problems
    assert errors.keys() == own.errors.keys()
    assert 1e-3 < max(own.errors.values()) < 0.1
    _show(Layout.parse(layout), settings, exact, run, verdict, own)
    said = capsys.readouterr().out
    assert "error of the gradient, in norm against float64 (one device in bfloat16)" in said
    assert "verdict: equal to one device" in said
    tight = dataclasses.replace(own, errors=dict.fromkeys(own.errors, 0.0))
    wrong = {name: 4 * max(error, 0.05) for name, error in own.errors.items()}
    assert "gradients are wrong" in judge(exact, run, wrong, settings, own).problems[0]
    assert set(judge(exact, run, errors, settings, tight).errors) == set(errors)
    for fault in ("row_parallel_without_its_sum", "shared_key_heads_without_their_sum"):
        run, errors = pool.run(
            "jobs:verify_with_fault", 2, fault, str(known.directory), layout, settings, str(gradients)
        )[0]
        assert judge(exact, run, errors, settings, own).problems, fault


def test_gradients_from_elsewhere_are_held_against_and_a_wrong_one_is_named(
    reference: Callable[..., Reference], tmp_path: Path
) -> None:
    known = reference("tied", SETTINGS)
    reader = CheckpointReader(known.gradients)
    wrong = "model.layers.1.self_attn.v_proj.weight"
    specs = {name: reader.spec(name) for name in reader.names()}
    with SafetensorsWriter(tmp_path / "wrong", specs) as writer:
        for name in specs:
            values = reader.entry(name).numpy()
            writer.write(name, values * np.float32(2.0) if name == wrong else values)
        writer.finish()
    arguments = ("--model", str(known.directory), "--pp", "2", "--steps", "1", "--against")
    done = _verify(*arguments, str(tmp_path / "wrong" / "model.safetensors"))
    assert done.returncode == 1
    assert (
        f"MISMATCH: 1 of 46 gradients are wrong (tolerance 1e-05); the worst is {wrong!r} with 0.5"
        in done.stdout
    )


def test_a_batch_is_written_for_others_to_compute(
    reference: Callable[..., Reference], tmp_path: Path
) -> None:
    known = reference("dense", SETTINGS)
    target = tmp_path / "batch.safetensors"
    done = CliRunner().invoke(app, ["verify", "--model", str(known.directory), "--write-batch", str(target)])
    assert done.exit_code == 0, done.output
    reader = CheckpointReader(target)
    for number, batch in enumerate(micro_batches(tiny("dense"), VerifySettings(), 0)):
        np.testing.assert_array_equal(reader.entry(f"tokens.{number}").numpy(), batch.tokens)
        np.testing.assert_array_equal(reader.entry(f"targets.{number}").numpy(), batch.targets)
        assert tuple(reader.entry(f"lengths.{number}").numpy()) == batch.lengths


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--tp", "3"), "tp 3 does not divide the model's 4 attention heads"),
        (("--dp", "3"), "dp 3 does not divide the step's 4 micro-batches"),
        (("--layout", "tp=2,foo=3"), "'foo=3' is not key=value"),
        (("--dtype", "float8"), "--dtype float8: choose among float32, float64, bfloat16"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_before_anything_starts(
    reference: Callable[..., Reference], arguments: tuple[str, ...], words: str
) -> None:
    directory = str(reference("tied", SETTINGS).directory)
    done = CliRunner().invoke(app, ["verify", "--model", directory, *arguments])
    assert done.exit_code != 0
    assert isinstance(done.exception, ConfigError)
    assert words in str(done.exception)
