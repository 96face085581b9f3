"""Algorithms on a partly trained model: held-out sampled accuracy rises from a quarter to above six tenths."""

from __future__ import annotations

import pytest

from rl import sorting_runs


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("algorithm", sorting_runs.ALGORITHMS)
def test_sorting_is_learnt_within_300_steps(algorithm: sorting_runs.Algorithm) -> None:
    model = sorting_runs.partly_trained()
    source = sorting_runs.start(algorithm, model)
    assert sorting_runs.accuracy(source, samples=4) == pytest.approx(0.2, abs=0.08)
    steps = list(sorting_runs.train(algorithm, model, source))
    assert steps[-1].step == 300
    assert {metrics.max_delta for metrics in steps} == {0.0}
    assert sorting_runs.accuracy(source, samples=4) >= 0.6
