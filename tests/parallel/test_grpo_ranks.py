"""GRPO over data-parallel ranks is GRPO on one device: the same answers, the same weights, all ranks in lockstep."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mainspring.errors import LockstepError
from mainspring.model.checkpoint import save_model
from mainspring.parallel import streaming
from mainspring.rl.ranks import RankRollouts
from parallel import grpo_jobs
from parallel.pool import JobError, Pool
from parallel.scoring import units_of
from rl import sorting


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("sorting") / "model"
    save_model(sorting.model("lockstep"), path)
    return str(path)


@pytest.mark.parametrize("layout", ["dp=2", "dp=2,zero=2", "dp=2,zero=3"])
def test_ranks_write_and_learn_what_one_device_does(pool: Pool, directory: str, layout: str) -> None:
    expected, weights = grpo_jobs.on_one(directory)
    ranks = pool.run("grpo_jobs:over_ranks", 2, directory, layout)
    start = sorting.model("lockstep").hf_tensors()
    for step in range(grpo_jobs.STEPS):
        whole = sorted(t.tokens for g in expected[step].groups for t in g)
        parts = sorted(t.tokens for metrics, _, _ in ranks for g in metrics[step].groups for t in g)
        assert parts == whole
        for metrics, _, _ in ranks:
            mine = metrics[step]
            assert (mine.max_delta, mine.lag) == (0.0, 0.0)
            assert mine.compared > 0
            assert mine.grad_norm == pytest.approx(expected[step].grad_norm, rel=1e-4)
            assert mine.entropy == pytest.approx(expected[step].entropy, rel=1e-5)
    moved = 0.0
    for _, seconds, found in ranks:
        assert seconds > 0
        for name, tensor in weights.items():
            np.testing.assert_allclose(found[name], tensor.numpy(), rtol=0, atol=2e-6, err_msg=name)
            moved = max(moved, float((tensor - start[name].detach()).abs().max()))
    assert moved > 1e-4


def test_tensor_parallel_ranks_are_in_lockstep_with_engines_of_the_whole_model(
    pool: Pool, directory: str
) -> None:
    expected, weights = grpo_jobs.on_one(directory)
    ranks = pool.run("grpo_jobs:over_ranks", 2, directory, "tp=2,tp_invariant=true")
    for step in range(grpo_jobs.STEPS):
        mine, other = (metrics[step] for metrics, _, _ in ranks)
        assert mine.groups == other.groups, "both have asked the same, and the first has rewarded"
        assert [len(g) for g in mine.groups] == [3] * 4
        assert (mine.max_delta, other.max_delta, mine.lag) == (0.0, 0.0, 0.0)

        # One device sums in another order: its numbers are others in their last bits.
        assert mine.reward == pytest.approx(expected[step].reward, abs=0.1)
        assert mine.grad_norm == pytest.approx(expected[step].grad_norm, rel=0.2)
    for _, _, found in ranks:
        for name, tensor in weights.items():
            np.testing.assert_allclose(found[name], tensor.numpy(), rtol=0, atol=1e-3, err_msg=name)


def test_a_rank_with_fewer_answers_cuts_as_many_mini_batches_as_the_others(
    pool: Pool, directory: str
) -> None:
    first, second = pool.run("grpo_jobs:with_dropped_answers", 2, directory)
    assert [count for count, _ in first] == [6] * grpo_jobs.STEPS
    assert [count for count, _ in second] == [2] * grpo_jobs.STEPS
    assert [norm for _, norm in first] == [norm for _, norm in second]


def test_what_ranks_cannot_share_is_refused(pool: Pool, directory: str) -> None:
    with pytest.raises(JobError, match="prompts_per_step = 4 is no multiple of the 3 data-parallel ranks"):
        pool.run("grpo_jobs:over_ranks", 3, directory, "dp=3")
    with pytest.raises(JobError, match="need a layout of dp and zero, and of tp only with tp_invariant"):
        pool.run("grpo_jobs:over_ranks", 2, directory, "tp=2")


def test_weights_that_did_not_arrive_are_seen_by_their_checksum(
    directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = units_of(directory, "dp=1", torch.float32, "lockstep")
    rollouts = RankRollouts(units, sorting.prompts(4, 3), sorting.TEXTS, sorting.Graded(), grpo_jobs.ROLLOUTS)
    assert units.model.embedding is not None
    units.model.embedding.data.add_(1)
    everything = list(streaming.stream_weights(units))
    monkeypatch.setattr(streaming, "stream_weights", lambda units: iter(everything[1:]))
    with pytest.raises(LockstepError, match="version 1: the engine's weights have the checksum"):
        rollouts.take_weights(1)
