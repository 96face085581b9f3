"""Learning rates follow their curve, by steps or by the clock."""

from __future__ import annotations

import pytest

from mainspring.train.recipe import ScheduleSection
from mainspring.train.schedule import learning_rate_factor, progress


def test_progress_is_the_further_of_steps_and_time() -> None:
    assert progress(5, 20, elapsed=1e9, max_seconds=None) == 0.25
    assert progress(5, 20, elapsed=30.0, max_seconds=60.0) == 0.5
    assert progress(15, 20, elapsed=30.0, max_seconds=60.0) == 0.75
    assert progress(3, 20, elapsed=99.0, max_seconds=60.0) == 1.0


def test_cosine() -> None:
    schedule = ScheduleSection(kind="cosine", warmup_fraction=0.2, final_factor=0.1)
    values = [learning_rate_factor(schedule, p) for p in (0.0, 0.1, 0.2, 0.6, 1.0)]
    assert values == pytest.approx([0.0, 0.5, 1.0, 0.55, 0.1])


def test_warm_up_stable_decay() -> None:
    schedule = ScheduleSection(kind="wsd", warmup_fraction=0.1, decay_fraction=0.4, final_factor=0.0)
    values = [learning_rate_factor(schedule, p) for p in (0.05, 0.1, 0.5, 0.6, 0.8, 1.0)]
    assert values == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.5, 0.0])


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.3, 1.0])
def test_factors_stay_between_0_and_1(kind: str, warmup: float) -> None:
    schedule = ScheduleSection(kind=kind, warmup_fraction=warmup, decay_fraction=1.0)
    assert all(0.0 <= learning_rate_factor(schedule, i / 50) <= 1.0 for i in range(51))
