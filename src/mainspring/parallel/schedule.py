"""Pipeline schedules: for each rank the list of what it computes, in order, and the timeline that results.

afab            all forward passes, then all backward passes (GPipe, arXiv 1811.06965)
1f1b            one forward, one backward, after a warm-up (PipeDream-flush, arXiv 2006.09503)
interleaved     1f1b over several chunks of layers a rank (Narayanan et al., arXiv 2104.04473, section 2.2)
zero_bubble     1f1b whose weight gradients (W) wait for a gap, with 1f1b's memory (ZB-H1, Qi et al., arXiv 2401.10241)
zero_bubble_h2  the same with twice the warm-up, and weight gradients twice as late: no rank waits between its first and
                its last pass, for the activations of 2 · ranks - 1 micro-batches (ZB-H2, there)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mainspring.errors import ConfigError
from mainspring.parallel.layout import ScheduleName

Kind = Literal["F", "B", "I", "W"]
COSTS: Mapping[Kind, float] = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}


@dataclass(frozen=True)
class Action:
    """F: forward; B: backward; I and W: its two halves, gradients of the input and of the weights."""

    kind: Kind
    stage: int
    micro: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro}"


Schedule = list[list[Action]]
"""Each rank's actions in order. Stage s is on rank s mod (number of ranks)."""


def make_schedule(name: ScheduleName, ranks: int, virtual: int, micro_batches: int) -> Schedule:
    """The schedule of `micro_batches` micro-batches over ranks · virtual stages."""
    if name == "afab":
        return [_afab(rank, micro_batches) for rank in range(ranks)]
    if name == "1f1b":
        return [_one_forward_one_backward(rank, ranks, micro_batches) for rank in range(ranks)]
    if name == "interleaved":
        if micro_batches % ranks:
            raise ConfigError(f"interleaved: {micro_batches} micro-batches are no multiple of {ranks} ranks")
        return [_interleaved(rank, ranks, virtual, micro_batches) for rank in range(ranks)]
    ahead = 2 if name == "zero_bubble_h2" else 1
    return [_zero_bubble(rank, ranks, micro_batches, ahead) for rank in range(ranks)]


def _afab(rank: int, count: int) -> list[Action]:
    return [Action("F", rank, m) for m in range(count)] + [Action("B", rank, m) for m in range(count)]


def _one_forward_one_backward(rank: int, ranks: int, count: int) -> list[Action]:
    warmup = min(ranks - rank - 1, count)
    actions = [Action("F", rank, m) for m in range(warmup)]
    for m in range(count - warmup):
        actions += [Action("F", rank, warmup + m), Action("B", rank, m)]
    return actions + [Action("B", rank, m) for m in range(count - warmup, count)]


def _interleaved(rank: int, ranks: int, virtual: int, count: int) -> list[Action]:
    total = count * virtual
    warmup = total if count == ranks else min((ranks - rank - 1) * 2 + (virtual - 1) * ranks, total)

    def place(k: int, forward: bool) -> tuple[int, int]:
        """(stage, micro-batch) of the k-th pass: `ranks` micro-batches through one chunk, then through the next."""
        chunk = k // ranks % virtual
        chunk = chunk if forward else virtual - 1 - chunk
        return chunk * ranks + rank, k // (ranks * virtual) * ranks + k % ranks

    actions = [Action("F", *place(k, True)) for k in range(warmup)]
    for k in range(total - warmup):
        actions += [Action("F", *place(warmup + k, True)), Action("B", *place(k, False))]
    return actions + [Action("B", *place(k, False)) for k in range(total - warmup, total)]


def _zero_bubble(rank: int, ranks: int, count: int, ahead: int) -> list[Action]:
    """1f1b whose weight gradients on rank r stay ahead · r micro-batches behind: they fill the gaps of its end.

    ahead: forward passes of the warm-up for each rank that follows.
    """
    warmup, behind = min(ahead * (ranks - rank - 1), count), ahead * rank
    actions = [Action("F", rank, m) for m in range(warmup)]
    for m in range(count):
        if warmup + m < count:
            actions.append(Action("F", rank, warmup + m))
        actions.append(Action("I", rank, m))
        if m >= behind:
            actions.append(Action("W", rank, m - behind))
    return actions + [Action("W", rank, m) for m in range(max(0, count - behind), count)]


def _ready(action: Action, done: Mapping[Action, float], stages: int) -> float | None:
    """When what the action needs is there; None if that is not known yet."""
    times = []
    for options in needs(action, stages):
        found = [done[a] for a in options if a in done]
        if not found:
            return None
        times.append(found[0])
    return max(times, default=0.0)


def needs(action: Action, stages: int) -> list[tuple[Action, ...]]:
    """What must have happened before, each as alternatives (a backward pass is whole or in halves)."""
    stage, micro = action.stage, action.micro
    if action.kind == "F":
        return [(Action("F", stage - 1, micro),)] if stage else []
    if action.kind == "W":
        return [(Action("I", stage, micro),)]
    before: list[tuple[Action, ...]] = [(Action("F", stage, micro),)]
    if stage < stages - 1:
        before.append((Action("B", stage + 1, micro), Action("I", stage + 1, micro)))
    return before


@dataclass(frozen=True)
class Timeline:
    """When each rank computes what, in units of a forward pass; `bubble` is the part of its time that a rank idles."""

    spans: list[list[tuple[float, float, Action]]]
    length: float
    bubble: float


def simulate(
    schedule: Sequence[Sequence[Action]], stages: int, costs: Mapping[Kind, float] = COSTS
) -> Timeline:
    """Runs the schedule with these costs and free communication. Costs are of a stage, so chunks cost as stages do.

    Raises ConfigError if it cannot be run to its end: an action waits for one that comes after it.
    """
    done: dict[Action, float] = {}
    spans: list[list[tuple[float, float, Action]]] = [[] for _ in schedule]
    free = [0.0] * len(schedule)
    cursor = [0] * len(schedule)
    while any(c < len(actions) for c, actions in zip(cursor, schedule, strict=True)):
        moved = False
        for rank, actions in enumerate(schedule):
            while cursor[rank] < len(actions):
                action = actions[cursor[rank]]
                ready = _ready(action, done, stages)
                if ready is None:
                    break
                start = max(free[rank], ready)
                free[rank] = done[action] = start + costs[action.kind]
                spans[rank].append((start, free[rank], action))
                cursor[rank] += 1
                moved = True
        if not moved:
            stuck = ", ".join(
                f"rank {r} at {a[c]}"
                for r, (a, c) in enumerate(zip(schedule, cursor, strict=True))
                if c < len(a)
            )
            raise ConfigError(f"the schedule cannot be run to its end: {stuck}")
    length = max(free)
    busy = sum(end - start for line in spans for start, end, _ in line)
    return Timeline(spans, length, 1.0 - busy / (length * len(schedule)))
