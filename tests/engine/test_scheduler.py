"""The scheduler keeps its promises for any mix of requests, on any cache size, without a model."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mainspring.engine.block_allocator import BlockAllocator
from mainspring.engine.messages import EngineRequest
from mainspring.engine.request import NO_SEAT, Request
from mainspring.engine.sampling_params import SamplingParams
from mainspring.engine.scheduler import ScheduledRequest, Scheduler

BLOCK_SIZE = 4


def make_request(name: str, prompt_length: int, max_tokens: int) -> Request:
    params = SamplingParams(max_tokens=max_tokens)
    # Prompts that share nothing: their first tokens differ.
    prompt = [len(name) * 1000 + ord(name[0]), *range(prompt_length - 1)]
    return Request(EngineRequest(name, prompt, params, (), max_tokens), random_key=0)


class Bench:
    """A scheduler and a stand-in for the model: every sampled token is 0."""

    def __init__(self, num_blocks: int, seats: int = 8, budget: int = 16) -> None:
        self.allocator = BlockAllocator(num_blocks)
        self.scheduler = Scheduler(self.allocator, BLOCK_SIZE, seats, budget)
        self.finished: list[str] = []

    def step(self) -> list[ScheduledRequest]:
        scheduled = self.scheduler.schedule()
        for item in scheduled:
            request = item.request
            assert item.start == request.num_computed
            assert len(request.block_table) * BLOCK_SIZE >= item.start + item.num_tokens
            request.num_computed += item.num_tokens
            self.scheduler.publish(request)
            if item.samples and request.append(0)[0] is not None:
                self.finished.append(request.request_id)
                self.scheduler.remove(request.request_id)
        self.check()
        return scheduled

    def check(self) -> None:
        self.allocator.check(r.block_table for r in self.scheduler.running.values())
        assert all(not r.block_table and r.num_computed == 0 for r in self.scheduler.waiting)
        seats = [r.seat for r in self.scheduler.running.values()]
        assert NO_SEAT not in seats
        assert len(set(seats)) == len(seats)


def names(scheduled: list[ScheduledRequest]) -> list[tuple[str, int]]:
    return [(item.request.request_id, item.num_tokens) for item in scheduled]


def test_prefill_chunks_and_decodes_share_a_step() -> None:
    bench = Bench(num_blocks=64, budget=16)
    bench.scheduler.add(make_request("short", 3, 9))
    assert names(bench.step()) == [("short", 3)]
    bench.scheduler.add(make_request("long", 40, 9))
    assert names(bench.step()) == [("short", 1), ("long", 15)]
    assert names(bench.step()) == [("short", 1), ("long", 15)]
    last = bench.scheduler.schedule()
    assert names(last) == [("short", 1), ("long", 10)]
    assert [item.samples for item in last] == [True, True]


def test_a_chunk_that_does_not_reach_the_prompts_end_samples_nothing() -> None:
    bench = Bench(num_blocks=64, budget=16)
    bench.scheduler.add(make_request("long", 40, 9))
    assert [item.samples for item in bench.scheduler.schedule()] == [False]


def test_seats_limit_what_runs_at_once() -> None:
    bench = Bench(num_blocks=64, seats=2)
    for name in "abc":
        bench.scheduler.add(make_request(name, 2, 5))
    assert [name for name, _ in names(bench.step())] == ["a", "b"]
    bench.scheduler.remove("a")
    assert [name for name, _ in names(bench.step())] == ["b", "c"]


def test_the_newest_gives_way_and_comes_back_first() -> None:
    bench = Bench(num_blocks=3, budget=16)
    bench.scheduler.add(make_request("old", 4, 8))
    bench.scheduler.add(make_request("new", 4, 8))
    bench.scheduler.add(make_request("later", 4, 8))
    assert names(bench.step()) == [("old", 4), ("new", 4), ("later", 4)]
    # Each needs a second block now and none is free: the oldest takes the newest's, the middle one yields.
    assert names(bench.step()) == [("old", 1)]
    assert bench.scheduler.num_preemptions == 2
    assert list(bench.scheduler.running) == ["old"]
    assert [r.request_id for r in bench.scheduler.waiting] == ["new", "later"]
    while "old" in bench.scheduler:
        bench.step()
    assert names(bench.step())[0][0] == "new"


def test_preempted_request_keeps_its_tokens_and_recomputes_them() -> None:
    bench = Bench(num_blocks=3)
    old, new = make_request("old", 5, 8), make_request("new", 4, 8)
    bench.scheduler.add(old)
    bench.scheduler.add(new)
    bench.step()
    assert new.num_generated == 1
    bench.step()
    assert "new" in bench.scheduler.waiting
    assert new.num_generated == 1
    while "old" in bench.scheduler:
        bench.step()
    assert names(bench.scheduler.schedule()) == [("new", 5)]


def test_removing_a_running_request_frees_its_blocks_and_a_waiting_one_leaves_the_line() -> None:
    bench = Bench(num_blocks=8, seats=1)
    bench.scheduler.add(make_request("a", 9, 5))
    bench.scheduler.add(make_request("b", 9, 5))
    bench.step()
    assert bench.allocator.num_used == 3
    assert bench.scheduler.remove("b") is not None
    assert bench.scheduler.remove("a") is not None
    assert bench.allocator.num_used == 0
    assert bench.scheduler.remove("a") is None
    assert bench.scheduler.schedule() == []


@settings(max_examples=80, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.integers(1, 30), st.integers(1, 12), st.integers(0, 6)), min_size=1, max_size=12
    ),
    num_blocks=st.integers(11, 24),  # the longest request, 30 + 12 - 1 tokens, needs 11
    seats=st.integers(1, 6),
    budget=st.integers(6, 40),
    aborts=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 11)), max_size=4),
)
def test_every_request_is_served_within_seats_and_budget_in_order_of_arrival(
    requests: list[tuple[int, int, int]],
    num_blocks: int,
    seats: int,
    budget: int,
    aborts: list[tuple[int, int]],
) -> None:
    bench = Bench(num_blocks, seats, budget)
    arrivals = {str(i): (sum(r[2] for r in requests[: i + 1]), r) for i, r in enumerate(requests)}
    aborted: set[str] = set()
    order = list(arrivals)
    for step in range(3000):
        for name, (when, (prompt_length, max_tokens, _)) in arrivals.items():
            if when == step:
                bench.scheduler.add(make_request(name, prompt_length, max_tokens))
        for when, victim in aborts:
            name = str(victim)
            if when == step and bench.scheduler.remove(name) is not None:
                aborted.add(name)
        scheduled = bench.step()
        assert sum(item.num_tokens for item in scheduled) <= budget
        assert len(bench.scheduler.running) <= seats
        waiting = [request.request_id for request in bench.scheduler.waiting]
        line = [order.index(name) for name in (*bench.scheduler.running, *waiting)]
        assert line == sorted(line)
        if step > max(when for when, _ in arrivals.values()) and not scheduled:
            break
    assert not bench.scheduler.running
    assert not bench.scheduler.waiting
    assert set(bench.finished) == set(arrivals) - aborted
    assert bench.allocator.num_used == 0
