"""Megatron-core itself as oracle, where it is installed: pip install --no-deps megatron-core==0.16.1."""

from __future__ import annotations

import socket
from typing import Any

import numpy as np
import pytest
import torch.multiprocessing

import mainspring.tensor as mt
from mainspring.tensor import parallel
from tensor import megatron_jobs, parallel_jobs

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
pytest.importorskip("megatron.core")


def on_ranks(job: str, arrays: dict[str, Any], size: int = 2) -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [
        context.Process(target=megatron_jobs.run, args=(r, job, size, port, arrays, answers))
        for r in range(size)
    ]
    for process in processes:
        process.start()
    results = dict(answers.get(timeout=120) for _ in range(size))
    for process in processes:
        process.join()
    assert all(isinstance(r, dict) for r in results.values()), results
    return [results[r] for r in range(size)]


def test_linear_layers_equal_megatrons() -> None:
    x = mt.randn(4, 3, 6, dtype=mt.float64, generator=mt.Generator(3))
    weight = mt.randn(4, 3, 6, dtype=mt.float64, generator=mt.Generator(4))
    ours = parallel.launch(parallel_jobs.mlp, 2, {})[0]
    arrays = {"x": x.tolist(), "weight": weight.tolist(), "first": ours["first"], "second": ours["second"]}
    theirs = on_ranks("layers", {k: np.asarray(v) for k, v in arrays.items()})
    for result in theirs:
        np.testing.assert_allclose(result["out"], ours["out"], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(result["grad_x"], ours["grad_x"], rtol=1e-12, atol=1e-12)
    whole = np.concatenate([r["grad_first"] for r in theirs], 0)
    np.testing.assert_allclose(whole, ours["grad_first"], rtol=1e-12, atol=1e-12)
    whole = np.concatenate([r["grad_second"] for r in theirs], 1)
    np.testing.assert_allclose(whole, ours["grad_second"], rtol=1e-12, atol=1e-12)


def test_cross_entropy_equals_megatrons() -> None:
    ours = parallel.launch(parallel_jobs.vocabulary, 2, 0.0)[0]
    weight = mt.randn(3, 5, 4, dtype=mt.float64, generator=mt.Generator(7))[..., 0]
    logits = mt.randn(3, 5, 12, dtype=mt.float64, generator=mt.Generator(8)) * 3.0
    target = mt.randint(0, 12, (3, 5), generator=mt.Generator(6))
    arrays = {"logits": logits, "weight": weight, "target": target}
    theirs = on_ranks("cross_entropy", {k: np.asarray(v.tolist()) for k, v in arrays.items()})
    for result in theirs:  # Megatron computes in float32 whatever it is given
        np.testing.assert_allclose(result["losses"], ours["losses"], rtol=2e-6, atol=2e-6)
    whole = np.concatenate([r["grad"] for r in theirs], -1)
    np.testing.assert_allclose(whole, ours["grad_logits"], rtol=1e-5, atol=1e-6)


def test_sample_indices_equal_megatrons() -> None:
    from megatron.core.datasets import helpers

    rng = np.random.default_rng(0)
    for _ in range(100):
        sizes = rng.integers(2, 30, 12).astype(np.int32)
        order = np.concatenate([rng.permutation(12) for _ in range(3)]).astype(np.int32)
        length, tokens = int(rng.integers(3, 17)), int(sizes.sum())
        for drop in (True, False):
            want = helpers.build_sample_idx(sizes, order, length, 3, tokens, drop, True)
            got = parallel.build_sample_idx(sizes, order, length, 3, tokens, drop, True)
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("weights", [[0.5, 0.25, 0.25], [0.75, 0.25], [1 / 3, 1 / 3, 1 / 3]])
def test_blending_equals_megatrons_where_float64_is_exact(weights: list[float]) -> None:
    from megatron.core.datasets import helpers

    dataset, sample = np.zeros(500, np.int16), np.zeros(500, np.int64)
    helpers.build_blending_indices(dataset, sample, np.asarray(weights), len(weights), 500, False)
    got = parallel.build_blending_indices(weights, 500)
    np.testing.assert_array_equal(got[0], dataset)
    np.testing.assert_array_equal(got[1], sample)
