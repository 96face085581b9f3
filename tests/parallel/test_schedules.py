"""Schedules: PyTorch's own orders, complete, runnable, within their memory and with the bubbles of their papers."""

from __future__ import annotations

from collections import Counter
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as oracle

from mainspring.errors import ConfigError
from mainspring.parallel.layout import ScheduleName
from mainspring.parallel.schedule import Action, Kind, Schedule, make_schedule, simulate
from mainspring.parallel.tensor import WeightGradients
from mainspring.parallel.timeline import draw_svg, draw_text

_KINDS = {
    oracle._ComputationType.FORWARD: "F",
    oracle._ComputationType.FULL_BACKWARD: "B",
    oracle._ComputationType.BACKWARD_INPUT: "I",
    oracle._ComputationType.BACKWARD_WEIGHT: "W",
}
_ZERO_BUBBLES: tuple[ScheduleName, ScheduleName] = ("zero_bubble_h2", "zero_bubble")
_TYPES = {kind: computation for computation, kind in _KINDS.items()}


def _ours(actions: list[oracle._Action | None]) -> list[str]:
    computed = [a for a in actions if a is not None and a.computation_type in _KINDS]
    return [f"{a.stage_index}{_KINDS[a.computation_type]}{a.microbatch_index}" for a in computed]


def _names(schedule: Schedule) -> list[list[str]]:
    return [[str(action) for action in actions] for actions in schedule]


@pytest.mark.parametrize(("ranks", "count"), [(1, 3), (2, 2), (2, 5), (4, 4), (4, 8), (4, 3)])
def test_afab_is_pytorchs_gpipe(ranks: int, count: int) -> None:
    theirs = object.__new__(oracle.ScheduleGPipe)
    theirs._num_stages, theirs._n_microbatches = ranks, count
    order = theirs._get_pipeline_order()
    assert order is not None
    assert _names(make_schedule("afab", ranks, 1, count)) == [_ours(order[rank]) for rank in range(ranks)]


def _pytorchs_order(rank: int, ranks: int, count: int, zero_bubble: bool) -> list[str]:
    """1f1b with one chunk a rank, by the function behind PyTorch's interleaved schedules."""
    warmup = oracle._get_warmup_ops(rank, 1, count, ranks, count, multiply_factor=1)
    order = oracle._get_1f1b_rank_ops(
        1, ranks, warmup, count - warmup, warmup, rank, lambda step: rank, lambda step: rank,
        num_1f1b_microbatches=rank, enable_zero_bubble=zero_bubble,
    )  # fmt: skip
    return _ours(order)


@pytest.mark.parametrize(("ranks", "count"), [(1, 3), (2, 2), (2, 5), (4, 4), (4, 8), (4, 3)])
def test_1f1b_is_pytorchs(ranks: int, count: int) -> None:
    expected = [_pytorchs_order(rank, ranks, count, False) for rank in range(ranks)]
    assert _names(make_schedule("1f1b", ranks, 1, count)) == expected


@pytest.mark.parametrize(("ranks", "count"), [(2, 5), (4, 8), (4, 16)])
def test_zero_bubble_is_pytorchs(ranks: int, count: int) -> None:
    expected = [_pytorchs_order(rank, ranks, count, True) for rank in range(ranks)]
    assert _names(make_schedule("zero_bubble", ranks, 1, count)) == expected


@pytest.mark.parametrize(
    ("ranks", "virtual", "count"), [(2, 2, 4), (2, 3, 6), (4, 2, 8), (4, 2, 12), (3, 2, 9)]
)
def test_the_interleaved_schedule_is_pytorchs(ranks: int, virtual: int, count: int) -> None:
    theirs = object.__new__(oracle.ScheduleInterleaved1F1B)
    theirs.pp_group_size, theirs.n_local_stages, theirs._n_microbatches = ranks, virtual, count
    theirs.microbatches_per_round = ranks
    expected = [_ours(theirs._calculate_single_rank_operations(rank)) for rank in range(ranks)]
    assert _names(make_schedule("interleaved", ranks, virtual, count)) == expected


@settings(deadline=None)
@given(
    ranks=st.integers(1, 5), virtual=st.integers(2, 3), rounds=st.integers(1, 4),
    name=st.sampled_from(["afab", "1f1b", "interleaved", "zero_bubble", "zero_bubble_h2"]),
)  # fmt: skip
def test_every_schedule_is_complete_and_runs_to_its_end(
    ranks: int, virtual: int, rounds: int, name: ScheduleName
) -> None:
    virtual = virtual if name == "interleaved" else 1
    count = ranks * rounds
    schedule = make_schedule(name, ranks, virtual, count)
    stages = ranks * virtual
    halves = ("F", "I", "W") if name.startswith("zero_bubble") else ("F", "B")
    expected = Counter(Action(kind, s, m) for kind in halves for s in range(stages) for m in range(count))
    assert Counter(action for actions in schedule for action in actions) == expected
    assert all(action.stage % ranks == rank for rank, actions in enumerate(schedule) for action in actions)
    simulate(schedule, stages)  # raises if it cannot
    theirs = {
        rank: [oracle._Action(a.stage, _TYPES[a.kind], a.micro) for a in actions]
        for rank, actions in enumerate(schedule)
    }
    oracle._validate_schedule(theirs, ranks, stages, count)


@pytest.mark.parametrize(("ranks", "count"), [(2, 4), (4, 8), (4, 16), (8, 16)])
def test_bubbles_are_those_of_the_papers(ranks: int, count: int) -> None:
    def bubble(name: ScheduleName, virtual: int = 1) -> float:
        return simulate(make_schedule(name, ranks, virtual, count), ranks * virtual).bubble

    plain = (ranks - 1) / (count + ranks - 1)  # Narayanan et al., section 2.2
    assert bubble("afab") == pytest.approx(plain)
    assert bubble("1f1b") == pytest.approx(plain)
    assert bubble("zero_bubble") == pytest.approx((ranks - 1) / (3 * count + ranks - 1))  # Qi et al., table 2
    assert bubble("interleaved", 2) == pytest.approx((ranks - 1) / (2 * count + ranks - 1))


@pytest.mark.parametrize(
    ("name", "held"), [("afab", 8), ("1f1b", 4), ("zero_bubble", 4), ("zero_bubble_h2", 7)]
)
def test_activations_held_at_once(name: ScheduleName, held: int) -> None:
    most = 0
    for actions in make_schedule(name, 4, 1, 8):
        now = 0
        for action in actions:
            now += {"F": 1, "B": -1, "I": 0, "W": -1}[action.kind]
            most = max(most, now)
    assert most == held


@pytest.mark.parametrize(("ranks", "count"), [(2, 8), (4, 8), (4, 16), (8, 32)])
def test_with_twice_the_warm_up_the_last_rank_never_waits_again(ranks: int, count: int) -> None:
    """Also where attention makes gradients of inputs dearer than those of weights, which zb-h1 cannot hide."""
    costs: dict[Kind, float] = {"F": 1.0, "B": 2.2, "I": 1.4, "W": 0.8}
    whole, half = (
        simulate(make_schedule(name, ranks, 1, count), ranks, costs).bubble for name in _ZERO_BUBBLES
    )
    assert whole == pytest.approx((ranks - 1) / (3.2 * count + ranks - 1))
    assert half > 1.4 * whole


def test_a_schedule_that_waits_for_itself_is_refused() -> None:
    with pytest.raises(ConfigError, match="rank 0 at 0B0, rank 1 at 1B0"):
        simulate([[Action("B", 0, 0), Action("F", 0, 0)], [Action("B", 1, 0), Action("F", 1, 0)]], 2)


def test_the_timeline_is_drawn_with_its_bubble() -> None:
    timeline = simulate(make_schedule("1f1b", 2, 1, 2), 2)
    assert draw_text(timeline).splitlines() == [
        "rank 0  F0 F1 .. .. B0 -- .. B1 --",
        "rank 1  .. F0 B0 -- F1 B1 -- .. ..",
        "bubble 33.3% of 9",
    ]
    picture = ElementTree.fromstring(draw_svg(timeline))
    assert len(picture.findall("{http://www.w3.org/2000/svg}rect")) == 8


def test_weight_gradients_that_waited_record_no_graph() -> None:
    """Else each micro-batch's activations would live as long as the sum of the gradients."""
    waiting = WeightGradients()
    weight = torch.nn.Parameter(torch.randn(3, 2))
    x, grad = torch.randn(4, 2, requires_grad=True), torch.randn(4, 3)
    for _ in range(2):
        waiting.put((weight, grad, x))
        waiting.run(waiting.take())
    assert weight.grad is not None
    assert not weight.grad.requires_grad
    torch.testing.assert_close(weight.grad, 2 * grad.t() @ x.detach())
