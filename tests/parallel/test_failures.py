"""When something goes wrong: a hang names rank, step and collective; a loss that is not finite names its module."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from mainspring.parallel.layout import Layout
from mainspring.parallel.monitor import HUNG
from mainspring.train.verify import VerifySettings
from parallel.conftest import Reference
from parallel.jobs import join_late
from parallel.pool import Pool

SETTINGS = VerifySettings(steps=2)


def test_a_collective_that_one_rank_does_not_enter_ends_the_run_with_its_name(tmp_path: Path) -> None:
    environment = {
        **os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    store = str(tmp_path / "store")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "parallel.hang", str(rank), store],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        _, words = ranks[0].communicate(timeout=120)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert ranks[0].returncode == HUNG
    assert "rank 0, step 7, in all_reduce over " in words
    assert "(ranks 0, 1, 12 bytes)" in words
    assert "nothing has happened for 2 s (the limit is 2 s)" in words
    assert 'hang.py", line' in words  # the stack trace


def test_a_watch_that_is_stopped_or_sees_progress_ends_nothing() -> None:
    code = (
        "import time; from mainspring.parallel.monitor import Monitor\n"
        "busy, over = Monitor(0), Monitor(1)\n"
        "busy.watch(0.5); over.watch(0.5); over.stop()\n"
        "for _ in range(20): time.sleep(0.1); busy.progress()\n"
        "busy.stop(); print('alive')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


def test_a_restarted_rank_does_not_look_for_its_peers_where_they_died(pool: Pool) -> None:
    """torchrun keeps the store: a rank may be there again before the other one has a new address."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    # Which of the two calls the other depends on their ports: so each is the late one, and more than once.
    for attempt, late in ((0, None), (1, 1), (2, 0), (3, 1), (4, 0)):
        delays = [0.6 * (rank == late) for rank in (0, 1)]
        ranks = [pool.process(join_late, rank, store.port, attempt, delays[rank]) for rank in (0, 1)]
        for rank in ranks:
            rank.join(60)
        assert [rank.exitcode for rank in ranks] == [0, 0], attempt


@pytest.mark.parametrize(
    ("layout", "parameter", "rank"),
    [
        ("pp=2", "layers.2.mlp.down.weight", 1),
        ("dp=2,zero=3", "layers.1.attention.qkv.weight", 0),
        ("tp=2", "layers.0.mlp.gate_up.weight", 0),
    ],
)
def test_a_loss_that_is_not_finite_names_the_first_module(
    pool: Pool, reference: Callable[..., Reference], layout: str, parameter: str, rank: int
) -> None:
    directory = str(reference("dense", SETTINGS).directory)
    found = pool.run("jobs:spoil", Layout.parse(layout).world, directory, layout, parameter)
    layer = ".".join(parameter.split(".")[:2])
    assert found[rank] is not None
    assert found[rank].startswith(f"the output of {layer}")
    assert found[rank].endswith(f"on rank {rank}")
