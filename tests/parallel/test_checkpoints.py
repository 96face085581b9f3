"""One checkpoint for every layout: written under one, read under another, bit for bit; failures leave the old whole."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mainspring.errors import CheckpointError
from mainspring.formats.model_config import ModelConfig
from mainspring.formats.safetensors_file import CheckpointReader
from mainspring.model.checkpoint import load_model
from mainspring.train.checkpoint import checkpoints
from mainspring.train.recipe_file import parse_recipe
from mainspring.train.trainer import Trainer
from mainspring.train.verify import VerifySettings
from parallel.conftest import Reference
from parallel.jobs import die_in_a_write
from parallel.pool import Pool

RECIPE = """
seed = 5
[data]
sources = ["{texts}"]
[tokenizer]
vocab_size = 270
[model]
architecture = "{architecture}"
hidden_size = 16
intermediate_size = 24
num_layers = 3
num_heads = 4
num_kv_heads = 2
num_experts = {experts}
[training]
sequence_length = 24
tokens_per_micro_batch = 48
accumulation_steps = 4
max_steps = 6
log_every = 3
[optimizer]
lr = 0.01
[checkpoint]
every = 3
keep = 5
[schedule]
kind = "constant"
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., str]:
    text = "".join(f"The {i}th line of {i * i % 89} says that {i % 7} follows.\n" for i in range(120))
    (tmp_path / "a.txt").write_text(text)

    def make(architecture: str = "Qwen3ForCausalLM", experts: int = 0) -> str:
        return RECIPE.format(texts=tmp_path / "a.txt", architecture=architecture, experts=experts)

    return make


def _same(a: Path, b: Path) -> bool:
    names = ("model.safetensors", "optimizer/model.safetensors")
    same_config = ModelConfig.from_file(a) == ModelConfig.from_file(b)
    return same_config and all(filecmp.cmp(a / name, b / name, shallow=False) for name in names)


@pytest.mark.parametrize(
    ("kind", "layout", "ranks"),
    [
        ("biased", "tp=4,sequence_parallel=false", 4),
        ("tied", "pp=2,tp=2", 4),
        ("dense", "dp=2,zero=3", 2),
        ("moe", "dp=2,tp=2,ep=2,zero=3", 4),
        ("moe-tied", "pp=2,dp=2,cp=2,ep=4,zero=1", 8),
    ],
)
def test_a_model_read_and_written_under_a_layout_keeps_every_bit(
    pool: Pool, reference: Callable[..., Reference], tmp_path: Path, kind: str, layout: str, ranks: int
) -> None:
    directory = reference(kind, VerifySettings(steps=2)).directory
    pool.run("jobs:rewrite", ranks, str(directory), layout, str(tmp_path / "copy"))
    old, new = CheckpointReader(directory), CheckpointReader(tmp_path / "copy")
    assert set(old.names()) == set(new.names())
    for name in old.names():
        assert old.entry(name).data == new.entry(name).data, name


@pytest.mark.parametrize(
    ("architecture", "first", "second"),
    [
        ("Qwen3ForCausalLM", (4, ["parallel.tp=2", "parallel.zero=3"]), (2, ["parallel.pp=2"])),
        (
            "Qwen3ForCausalLM",
            (2, ["parallel.zero=1", "optimizer.name=muon", "training.dtype=bfloat16"]),
            (2, ["parallel.tp=2", "optimizer.name=muon", "training.dtype=bfloat16", "parallel.offload=true"]),
        ),
        ("Qwen3MoeForCausalLM", (4, ["parallel.ep=2", "parallel.zero=2"]), (2, ["parallel.tp=2"])),
    ],
)
def test_a_run_continues_bitwise_under_its_layout_and_loads_bitwise_under_another(
    pool: Pool,
    recipe: Callable[..., str],
    tmp_path: Path,
    architecture: str,
    first: tuple[int, list[str]],
    second: tuple[int, list[str]],
) -> None:
    text = recipe(architecture, 4 if "Moe" in architecture else 0)
    whole, halves, moved = (tmp_path / name for name in ("whole", "halves", "moved"))
    pool.run("jobs:train", first[0], text, [*first[1], f"output='{whole}'"])
    pool.run("jobs:train", first[0], text, [*first[1], f"output='{halves}'", "training.max_steps=3"])
    pool.run("jobs:train", first[0], text, [*first[1], f"output='{halves}'"], True)
    assert _same(whole / "step-00000006", halves / "step-00000006")
    # Under another layout nothing is trained, but everything is loaded and written.
    shutil.copytree(whole / "step-00000006", moved / "step-00000006")
    overrides = [*second[1], f"output='{moved}'", "training.max_steps=6"]
    done = pool.run("jobs:train", second[0], text, overrides, True)
    assert done[0]["step"] == 6
    assert _same(whole / "step-00000006", Path(done[0]["checkpoint"]))


def test_one_device_reads_a_layouts_checkpoint_and_the_other_way_round(
    pool: Pool, recipe: Callable[..., str], tmp_path: Path
) -> None:
    text = recipe()
    spread, alone = tmp_path / "spread", tmp_path / "alone"
    pool.run("jobs:train", 2, text, ["parallel.zero=3", f"output='{spread}'", "training.max_steps=3"])
    Trainer(parse_recipe(text, overrides=[f"output='{alone}'", "training.max_steps=3"])).run()
    losses = [
        json.loads(line)["loss"] for folder in (spread, alone)
        for line in (folder / "metrics.jsonl").read_text().splitlines() if '"event": "step"' in line
    ]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    names = {tuple(CheckpointReader(f / "step-00000003/optimizer").names()) for f in (spread, alone)}
    assert len({frozenset(n) for n in names}) == 1
    Trainer(parse_recipe(text, overrides=[f"output='{spread}'"]), resume=True).run()
    done = pool.run("jobs:train", 2, text, ["parallel.tp=2", f"output='{alone}'"], True)
    assert done[0]["step"] == 6


def test_a_blend_of_sources_goes_on_exactly_under_another_number_of_replicas(
    pool: Pool, recipe: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "b.txt").write_text("".join(f"{i} und {i * 3 % 11}\n" for i in range(60)))
    sources = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    overrides = [f"data.sources={sources}", "data.weights=[1, 4]", "training.log_every=1"]
    pool.run("jobs:train", 2, recipe(), [*overrides, f"output='{whole}'"])
    pool.run("jobs:train", 2, recipe(), [*overrides, f"output='{parts}'", "training.max_steps=3"])
    again = pool.run("jobs:train", 4, recipe(), [*overrides, f"output='{parts}'", "parallel.zero=2"], True)
    assert again[0]["step"] == 6
    losses = [
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()
         if '"event": "step"' in line]
        for folder in (whole, parts)
    ]  # fmt: skip
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    with pytest.raises(AssertionError, match="settings have changed"):
        pool.run("jobs:train", 4, recipe(), [*overrides, f"output='{parts}'", "data.weights=[1, 1]"], True)


@pytest.mark.parametrize(("failing", "every"), [(0, 3), (1, 3), (0, 1), (1, 1)])
def test_a_full_disk_on_one_rank_is_an_error_on_all_and_leaves_the_old_checkpoint_whole(
    pool: Pool, recipe: Callable[..., str], tmp_path: Path, failing: int, every: int
) -> None:
    """The second save fails: the one at the end, or one that is written beside the steps."""
    output = tmp_path / "out"
    overrides = ["parallel.zero=1", f"output='{output}'", f"checkpoint.every={every}"]
    done = pool.run("jobs:train", 2, recipe(), overrides, False, failing)
    assert "ENOSPC" in done[failing]["error"]
    assert f"rank {failing} failed" in done[1 - failing]["error"]
    assert sorted(p.name for p in output.glob("*step-*")) == [f"step-{every:08d}"]
    CheckpointReader(output / f"step-{every:08d}")
    again = pool.run("jobs:train", 2, recipe(), overrides, True)
    assert again[0]["step"] == 6


def test_texts_that_cannot_be_read_are_an_error_on_all_ranks(
    pool: Pool, recipe: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(AssertionError, match="another rank cannot start") as raised:
        pool.run("jobs:train", 2, recipe(), [f"output='{tmp_path / 'out'}'"])
    assert "byte 0 is not valid utf-8" in str(raised.value)


def test_a_loss_that_is_not_finite_ends_the_run_and_the_checkpoint_being_written_is_the_last_good_one(
    pool: Pool, recipe: Callable[..., str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    overrides = ["parallel.zero=3", "checkpoint.every=1", f"output='{output}'"]
    spoiled = "layers.1.attention.qkv.weight"
    for error in pool.run("jobs:train_into_infinity", 2, recipe(), overrides, 2, spoiled):
        assert "step 3: the loss is" in error
        assert "first to be not finite is the output of layers.1" in error
        assert "The last checkpoint is untouched" in error
    assert [step for step, _ in checkpoints(output)] == [1, 2]
    weights = load_model(output / "latest", dtype="float32")
    assert all(bool(p.isfinite().all()) and float(p.detach().abs().max()) < 100 for p in weights.parameters())


def test_a_rank_killed_while_it_writes_loses_only_what_came_after_the_last_complete_checkpoint(
    pool: Pool, recipe: Callable[..., str], tmp_path: Path
) -> None:
    output, whole = tmp_path / "out", tmp_path / "whole"
    overrides = ["parallel.zero=3", "checkpoint.every=1"]
    store = str(tmp_path / "store")
    ranks = [
        pool.process(die_in_a_write, rank, 2, store, recipe(), [*overrides, f"output='{output}'"], 3)
        for rank in (0, 1)
    ]
    for rank in ranks:
        rank.join(120)
    assert ranks[1].exitcode == -signal.SIGKILL
    assert ranks[0].exitcode not in (None, 0)  # the other one does not wait for the dead
    assert [step for step, _ in checkpoints(output)] == [1, 2]
    CheckpointReader(output / "step-00000002" / "optimizer")
    again = pool.run("jobs:train", 2, recipe(), [*overrides, f"output='{output}'"], True)
    assert again[0]["step"] == 6
    pool.run("jobs:train", 2, recipe(), [*overrides, f"output='{whole}'"])
    assert _same(whole / "step-00000006", output / "step-00000006")


def test_a_truncated_or_missing_shard_is_refused_under_a_layout(
    pool: Pool, recipe: Callable[..., str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    pool.run("jobs:train", 2, recipe(), [f"output='{output}'", "training.max_steps=3"])
    shard = output / "step-00000003" / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(AssertionError, match=r"CheckpointError.*truncated"):
        pool.run("jobs:train", 2, recipe(), [f"output='{output}'"], True)
    with pytest.raises(CheckpointError, match="truncated"):
        CheckpointReader(output / "step-00000003")
    shard.unlink()
    for error, watchdogs in pool.run("jobs:resume_refused", 2, recipe(), [f"output='{output}'"]):
        assert "step-00000003 has neither model.safetensors" in error
        assert watchdogs == 0  # a process that goes on with something else is not ended later


@pytest.mark.slow
def test_a_rank_killed_in_the_middle_of_a_save_loses_nothing_and_torchrun_continues_the_run(
    recipe: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "r.toml").write_text(recipe())
    output = tmp_path / "out"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1",
        "-m", "mainspring", "train", str(tmp_path / "r.toml"), "--zero", "3", "--output", str(output),
        "--set", "training.max_steps=60", "--set", "checkpoint.every=1", "--set", "checkpoint.keep=1000",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    log = tmp_path / "log"
    with log.open("wb") as stream:
        launcher = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream)
    try:
        victim, kept = _kill_in_a_save(launcher.pid, output)
        assert launcher.wait(timeout=240) == 0, log.read_text()
    finally:
        _stop(launcher)
    text = log.read_text()
    assert "resuming from" in text
    steps = sorted(int(path.name.removeprefix("step-")) for path in output.glob("step-*"))
    assert steps[-1] == 60
    assert {int(path.name.removeprefix("step-")) for path in kept} <= set(steps)
    for path in kept:  # what was there when the rank died
        CheckpointReader(path)
        CheckpointReader(path / "optimizer")
    assert not list(output.glob(".step-*.partial"))
    assert victim not in [child.pid for child in psutil.process_iter()]


def _kill_in_a_save(launcher: int, output: Path) -> tuple[int, list[Path]]:
    """Kills a rank while a partial directory is there; returns its id and the checkpoints of that moment."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if len(list(output.glob("step-*"))) > 2 and list(output.glob(".step-*.partial")):
            ranks = [c for c in psutil.Process(launcher).children(recursive=True) if "train" in c.cmdline()]
            kept = sorted(output.glob("step-*"))
            ranks[-1].send_signal(signal.SIGKILL)
            return ranks[-1].pid, kept
        time.sleep(0.001)
    raise AssertionError("no save was seen")


def _stop(launcher: subprocess.Popen[bytes]) -> None:
    if launcher.poll() is None:
        for child in psutil.Process(launcher.pid).children(recursive=True):
            child.kill()
        launcher.kill()
        launcher.wait()
