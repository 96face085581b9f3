"""Who is served next."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from engine.test_core import (
    tiny_model,
)
from mainspring.engine.admission import make_request
from mainspring.engine.config import EngineConfig
from mainspring.engine.core import EngineCore
from mainspring.engine.messages import EngineRequest
from mainspring.engine.request import Request
from mainspring.engine.sampling_params import SamplingParams
from mainspring.engine.waiting_queue import WaitingQueue


def test_priority_goes_before_arrival_and_keeps_its_blocks() -> None:
    model = tiny_model("llama")
    core = EngineCore(model, EngineConfig(max_num_seqs=1, scheduling_policy="priority"))
    for name, priority in (("late", 5), ("urgent", -1), ("normal", 0), ("normal too", 0)):
        request = make_request(name, [1, 2], SamplingParams(max_tokens=1), core.limits, ())
        core.add_request(replace(request, priority=priority))
    order = []
    while core.has_work():
        order += [output.request_id for output in core.step()]
    assert order == ["urgent", "normal", "normal too", "late"]


@settings(max_examples=50, deadline=None)
@given(
    ranks=st.lists(st.integers(-3, 3), min_size=1, max_size=30),
    removals=st.lists(st.integers(0, 29), max_size=15),
)
def test_the_waiting_line_is_in_order_of_rank_whoever_leaves_it(
    ranks: list[int], removals: list[int]
) -> None:
    queue = WaitingQueue()
    expected = {}
    for arrival, priority in enumerate(ranks):
        message = EngineRequest(str(arrival), [1], SamplingParams(), (), 1, priority=priority)
        request = Request(message, 0)
        request.arrival = arrival
        queue.add(request)
        expected[str(arrival)] = request
    for name in map(str, removals):
        assert queue.remove(name) is expected.pop(name, None)
    order = sorted(expected.values(), key=lambda request: (request.priority, request.arrival))
    assert list(queue) == order
    for request in order:
        assert queue.first() is request
        queue.remove(request.request_id)
    assert not queue
