"""The bars at the end of `benchmarks/kernels.py`: computed from the rows that a run has measured."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import pytest

CEILINGS = {"GB": 3000.0, "GFLOP": 800.0}


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules (bars, timing) of benchmarks/kernel_groups."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("kernel_groups.bars"), importlib.import_module("kernel_groups.timing")


def compared(row: Any, group: str, name: str, ratio: float, peer: str) -> Any:
    """A row in which ours takes 100 us and the peer `ratio` times as long."""
    return row(group, name, 1.0, "GFLOP", 100.0, 1.0, 100.0 * ratio, 1.0, peer)


def moved(row: Any, group: str, name: str, share: float, gigabytes: float = 1.0) -> Any:
    """A row that reaches a share of a copy's bandwidth."""
    return row(group, name, gigabytes, "GB", gigabytes * 1e6 / (share * CEILINGS["GB"]), 0.1)


def test_a_grid_is_judged_by_its_geometric_mean_and_its_lowest_cell(groups: Any) -> None:
    bars, timing = groups
    ratios = {"d128 full S=512": 0.7, "d128 causal S=8192": 1.3, "d64 full S=512": 1.2}
    rows = [compared(timing.Row, "forward", f"cuda {name}", r, "cuDNN") for name, r in ratios.items()]
    rows += [  # none of these is a cell of that grid
        compared(timing.Row, "forward", "cuda d128 full S=512", 9.0, "flash2"),
        compared(timing.Row, "forward", "cuda, canonical d128 full S=512", 9.0, "cuDNN"),
        compared(timing.Row, "backward", "cuda, deterministic d64 full S=512", 9.0, "cuDNN"),
    ]
    (bar,) = bars.bars(rows, CEILINGS)
    assert math.isclose(bar.measured, (0.7 * 1.3 * 1.2) ** (1 / 3))
    assert (bar.must, bar.goal, bar.lowest) == (0.90, 1.05, 0.7)
    assert not bar.met  # the mean is above 0.90, a cell below 0.75
    assert bar.goal_met is False
    assert "NOT MET, goal not met" in bar.text()


def test_triton_must_beat_flash2_and_has_cudnn_for_its_goal(groups: Any) -> None:
    bars, timing = groups
    rows = [compared(timing.Row, "forward", "triton d64 causal S=512", 1.3, "flash2")]
    rows += [compared(timing.Row, "forward", "triton d64 causal S=512", 0.93, "cuDNN")]
    must, goal = bars.bars(rows, CEILINGS)
    assert (must.must, must.goal, must.met, must.goal_met) == (1.25, None, True, None)
    assert (goal.must, goal.goal, goal.met, goal.goal_met) == (None, 0.92, True, True)


def test_decode_counts_caches_of_256_mb_and_more_in_16_bits(groups: Any) -> None:
    bars, timing = groups
    rows = [
        moved(timing.Row, "decode", "cuda d128 64x2048", 0.95, 0.537),
        moved(timing.Row, "decode", "cuda d64 64x2048", 0.89, 0.268),
        moved(timing.Row, "decode", "cuda d64 8x8192", 0.80, 0.134),
        moved(timing.Row, "decode", "cuda fp8 d128 64x2048", 0.85, 0.268),
    ]
    (bar,) = bars.bars(rows, CEILINGS)
    assert math.isclose(bar.measured, 0.89)
    assert bar.met
    assert bar.goal_met is False


def test_products_are_parted_by_their_rows(groups: Any) -> None:
    bars, timing = groups
    by_rows = {1: 1.2, 64: 1.0, 128: 0.9, 1024: 0.96, 2048: 0.98, 8192: 1.0}
    rows = [compared(timing.Row, "linear", f"M={m} N=8 K=8", r, "cuBLAS") for m, r in by_rows.items()]
    rows.append(compared(timing.Row, "linear", "tp_invariant M=64 N=8 K=8", 0.1, "own canonical"))
    many, some, few = bars.bars(rows, CEILINGS)
    assert math.isclose(many.measured, math.sqrt(0.98))
    assert math.isclose(some.measured, math.sqrt(0.9 * 0.96))
    assert math.isclose(few.measured, math.sqrt(1.2))
    assert [b.met for b in (many, some, few)] == [True, True, True]
    assert [b.goal_met for b in (many, some, few)] == [True, False, True]


def test_the_smallest_share_and_rate_count(groups: Any) -> None:
    bars, timing = groups
    names = {"rms_norm": 0.97, "swiglu": 0.94, "rope in place": 0.96, "token_log_probs 64x9": 0.2}
    rows = [moved(timing.Row, "rowwise", name, share) for name, share in names.items()]
    rows += [
        moved(timing.Row, "rowwise", "add_rms_norm backward", 0.79),
        moved(timing.Row, "rowwise", "rope backward", 0.98),
    ]
    rows += [
        timing.Row("loss", f"M=8 V={v} H=4096 bfloat16", 6e5, "GFLOP", us, 1.0)
        for v, us in ((1, 1e6), (2, 1.1e6))
    ]
    loss, forward, backward = bars.bars(rows, CEILINGS)
    assert math.isclose(loss.measured, 6e5 / 1.1e6 * 1e3)
    assert math.isclose(forward.measured, 0.94)
    assert forward.goal_met
    assert math.isclose(backward.measured, 0.79)
    assert not backward.met


def test_what_was_not_measured_has_no_bar(groups: Any) -> None:
    bars, timing = groups
    assert bars.bars([], CEILINGS) == []
    rows = [
        compared(timing.Row, "muon", "822M float32", 2.0, "torch.optim.Muon"),
        compared(timing.Row, "adamw", "822M float32", 1.1, "torch fused"),
        compared(timing.Row, "experts", "8 experts top 2 K=2 N=4", 1.25, "grouped_mm"),
        compared(timing.Row, "experts", "8 experts top 2 K=2 N=4 dX", 0.5, "grouped_mm"),
        compared(timing.Row, "experts", "8 experts top 2 K=2 N=4 gathered", 0.5, "index + grouped_mm"),
    ]
    adamw, muon, experts = bars.bars(rows, CEILINGS)
    assert (adamw.met, adamw.goal_met, adamw.lowest) == (True, False, None)
    assert (muon.met, muon.goal_met) == (True, True)
    assert (experts.met, experts.goal_met, experts.lowest) == (True, True, 1.25)
