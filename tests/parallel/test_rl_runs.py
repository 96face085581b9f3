"""`mainspring rl` over ranks: what one device does, resumed to the bit, and continued by torchrun when a rank dies."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from mainspring.cli.rollout_pages import read_groups
from mainspring.errors import CheckpointError
from mainspring.model.checkpoint import load_model
from mainspring.rl.run import RlRun
from mainspring.rl.value_model import ValueModel
from mainspring.train.metrics import Progress
from parallel.pool import JobError, Pool
from rl.small_runs import RECIPE, lines, prepare, recipe
from support.byte_tokenizer import byte_tokenizer

# A large eps makes AdamW's step a smooth function of the gradient, so that equal weights mean equal gradients.
SMOOTH = ["rollouts.prompts_per_step=4", "grpo.mini_batches=1", "optimizer.lr=0.01", "optimizer.eps=0.01"]
SMOOTH += ["critic.lr=0.01", "critic.eps=0.01"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return prepare(tmp_path)


@pytest.fixture
def judged(folder: Path) -> str:
    """The pool's processes may start none of their own, as a reward function needs: a reward model, random too."""
    judge = ValueModel.of(load_model(folder / "model"), "sequence")
    with torch.no_grad():
        judge.score.weight.normal_(generator=torch.Generator().manual_seed(3))
    judge.save(folder / "judge", tokenizer=byte_tokenizer())
    return f"reward.model={str(folder / 'judge')!r}"


@pytest.mark.parametrize(("algorithm", "zero"), [("grpo", 3), ("vapo", 2)])
def test_ranks_do_what_one_device_does_and_write_the_checkpoint_that_it_would(
    pool: Pool, folder: Path, judged: str, algorithm: str, zero: int
) -> None:
    here, there = ([*SMOOTH, judged, f"output={str(folder / name)!r}"] for name in ("one", "two"))
    alone = RlRun(recipe(folder, algorithm, *here), show=Progress(silent=True)).run()
    results = pool.run("rl_jobs:run", 2, str(folder), algorithm, [*there, f"parallel.zero={zero}"])
    assert results == [(4, False, pytest.approx(alone.validation))] * 2
    one, two = load_model(folder / "one" / "latest"), load_model(folder / "two" / "latest")
    start = load_model(folder / "model")
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)
    assert not torch.equal(two.embedding, start.embedding)
    if algorithm == "vapo":
        critics = [ValueModel.load(folder / name / "latest" / "critic") for name in ("one", "two")]
        for a, b in zip(*(critic.parameters() for critic in critics), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-6)
        assert float(critics[1].score.weight.detach().abs().max()) > 1e-4
    first, second = (
        [r for r in lines(folder / name / "metrics.jsonl") if r["event"] == "step"] for name in ("one", "two")
    )
    for mine, theirs in zip(first, second, strict=True):
        assert mine.keys() < theirs.keys(), "and how long weights were on their way"
        for name, value in mine.items():
            if "second" not in name and name not in ("event", "elapsed", "compared"):
                expected = None if value is None else pytest.approx(value, rel=1e-3, abs=1e-6)
                assert theirs[name] == expected, name
        assert theirs["resharding_seconds"] > 0
    shown = [list(read_groups(folder / name, None, False)) for name in ("one", "two")]
    assert [g.step for g in shown[1]] == sorted(g.step for g in shown[1])
    texts = [
        sorted(
            (g.step, g.prompt, *(a.text for a in g.answers), *(round(a.advantage, 4) for a in g.answers))
            for g in s
        )
        for s in shown
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("algorithm", ["dapo", "ppo"])
def test_ranks_resume_to_the_bit_with_carried_and_dynamic_groups_and_only_with_as_many(
    pool: Pool, folder: Path, judged: str, algorithm: str
) -> None:
    changes = [
        judged,
        "rollouts.prompts_per_step=4",
        "rollouts.slice_tokens=4",
        "parallel.zero=1",
        "ppo.max_steps=4",
    ]
    whole, parts = ([*changes, f"output={str(folder / name)!r}"] for name in ("whole", "parts"))
    pool.run("rl_jobs:run", 2, str(folder), algorithm, whole)
    assert pool.run("rl_jobs:run", 2, str(folder), algorithm, parts, False, 2)[0][:2] == (2, True)
    assert pool.run("rl_jobs:run", 2, str(folder), algorithm, parts, True)[1][:2] == (4, False)
    models = [load_model(folder / name / "latest") for name in ("whole", "parts")]
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))
    for file in ("rollouts.jsonl", "rollouts-1.jsonl"):
        assert lines(folder / "whole" / file) == lines(folder / "parts" / file)
    with pytest.raises(CheckpointError, match=r"written by 2 rank\(s\).*this run has 1"):
        RlRun(recipe(folder, algorithm, *parts), resume=True)


def test_tensor_parallel_ranks_write_one_log_and_one_checkpoint(
    pool: Pool, folder: Path, judged: str
) -> None:
    results = pool.run("rl_jobs:run", 2, str(folder), "grpo", [judged, "parallel.tp=2", "grpo.max_steps=2"])
    assert results[0] == results[1]
    steps = [r for r in lines(folder / "out" / "metrics.jsonl") if r["event"] == "step"]
    assert all(r["max_delta"] == 0 and r["compared"] > 0 for r in steps)
    assert [len(g.answers) for g in read_groups(folder / "out", None, False)] == [3] * 6
    assert not (folder / "out" / "rollouts-1.jsonl").exists()
    assert not torch.equal(
        load_model(folder / "out" / "latest").embedding, load_model(folder / "model").embedding
    )


def test_what_does_not_run_over_ranks_is_refused(pool: Pool, folder: Path, judged: str) -> None:
    with pytest.raises(JobError, match="algorithm = 'sft' runs on one device; over ranks run grpo, dr_grpo"):
        pool.run("rl_jobs:run", 2, str(folder), "sft", [])
    with pytest.raises(JobError, match=r"engine\.ray_workers are settings of one device"):
        pool.run("rl_jobs:run", 2, str(folder), "grpo", ["lora.rank=2"])
    with pytest.raises(JobError, match="prompts_per_step = 3 is no multiple of the 2 data-parallel ranks"):
        pool.run("rl_jobs:run", 2, str(folder), "grpo", [judged, "rollouts.prompts_per_step=3"])
    with pytest.raises(JobError, match=r"parallel\.tp = 3 does not divide the 2 ranks"):
        pool.run("rl_jobs:run", 2, str(folder), "grpo", [judged, "parallel.tp=3"])


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_torchrun_starts_the_command_and_continues_it_when_a_rank_dies(folder: Path, zero: int) -> None:
    (folder / "r.toml").write_text(RECIPE.format(folder=folder, algorithm="grpo"))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1",
        "-m", "mainspring", "rl", str(folder / "r.toml"), "--zero", str(zero), "--set", "grpo.max_steps=40",
        "--set", "checkpoint.every=1", "--set", "rollouts.prompts_per_step=4",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])  # the reward function stands among the tests
    log = folder / "log"
    with log.open("wb") as stream:
        launcher = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream)
    try:
        _kill_a_rank_after(folder / "out" / "step-00000003", launcher.pid)
        assert launcher.wait(timeout=240) == 0, log.read_text()
    finally:
        if launcher.poll() is None:
            for child in psutil.Process(launcher.pid).children(recursive=True):
                child.kill()
            launcher.kill()
            launcher.wait()
    assert "resuming from" in log.read_text()
    steps = [r for r in lines(folder / "out" / "metrics.jsonl") if r["event"] == "step"]
    assert [r["step"] for r in steps] == list(range(1, 41))
    assert {r["max_delta"] for r in steps} == {0.0}


def _kill_a_rank_after(checkpoint: Path, launcher: int) -> None:
    deadline = time.monotonic() + 120
    while not checkpoint.exists():
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.01)
    ranks = [c for c in psutil.Process(launcher).children(recursive=True) if "rl" in c.cmdline()]
    ranks[-1].kill()
