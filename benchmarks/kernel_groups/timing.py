"""Timings of kernels beside a peer's: calls captured in CUDA graphs and replayed in turn.

Neither launch costs nor a drifting clock favour one side; inputs rotate among sets that together exceed the L2
cache, where a caller gives several calls. A row holds the median time of a call and half the distance between the
quartiles as its spread.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BF16 = torch.bfloat16
ROTATED_BYTES = 256 << 20
REPLAYS = 15
Calls = Sequence[Callable[[], object]]


@dataclass
class Row:
    """One line of the table. amount: of `unit` a call (GFLOP or GB); times in microseconds."""

    group: str
    name: str
    amount: float
    unit: str
    ours: float
    ours_spread: float
    peer: float | None = None
    peer_spread: float | None = None
    peer_name: str = ""

    @property
    def ratio(self) -> float | None:
        """Above 1: ours is faster."""
        return None if self.peer is None else self.peer / self.ours

    @property
    def rate(self) -> float:
        """GB/s or TFLOP/s."""
        return self.amount / self.ours * (1e6 if self.unit == "GB" else 1e3)

    def share(self, ceilings: Mapping[str, float]) -> float | None:
        """Of the rate that this GPU was measured to reach. ceilings: rates by unit."""
        return self.rate / ceilings[self.unit] if self.unit in ceilings else None

    def text(self, ceilings: Mapping[str, float]) -> str:
        line = (
            f"{self.group:10} {self.name:44} {self.ours:9.1f} us ±{self.ours_spread:6.1f} {self.rate:8.1f} "
        )
        line += "GB/s   " if self.unit == "GB" else "TFLOP/s"
        share = self.share(ceilings)
        line += "" if share is None else f" {share:6.1%}"
        return line + (f"  {self.ratio:5.2f}x {self.peer_name}" if self.ratio is not None else "")


def graph(calls: Calls) -> torch.cuda.CUDAGraph:
    """All calls, one after the other, in a graph that has been warmed up."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for call in calls:
            call()
    captured.replay()
    torch.cuda.synchronize()
    return captured


def times(many: Sequence[Calls], replays: int = REPLAYS) -> list[tuple[float, float]]:
    """(median, spread) in microseconds of a call, for several lists of calls whose graphs run in turn."""
    graphs = [graph(calls) for calls in many]
    measured: list[list[float]] = [[] for _ in many]
    for _ in range(replays):
        for i, captured in enumerate(graphs):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            captured.replay()
            end.record()
            end.synchronize()
            measured[i].append(start.elapsed_time(end) * 1e3 / len(many[i]))
    out = []
    for values in measured:
        low, _, high = statistics.quantiles(values, n=4)
        out.append((statistics.median(values), (high - low) / 2))
    return out


def eager_times(run: Callable[[], object], count: int = 7) -> tuple[float, float]:
    """(median, spread) in microseconds of calls outside a graph: what autograd or an optimizer of torch's does on
    the host cannot be captured."""
    for _ in range(2):
        run()
    found = []
    for _ in range(count):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) * 1e3)
    low, _, high = statistics.quantiles(found, n=4)
    return statistics.median(found), (high - low) / 2


def row(
    group: str,
    name: str,
    amount: float,
    unit: str,
    ours: Calls,
    peer: Calls | None = None,
    peer_name: str = "",
) -> Row:
    if peer is None:
        return Row(group, name, amount, unit, *times([ours])[0])
    found = times([ours, peer])
    return Row(group, name, amount, unit, *found[0], *found[1], peer_name)


def rows(
    group: str, name: str, amount: float, unit: str, ours: Calls, peers: Mapping[str, Calls]
) -> Iterator[Row]:
    """A row for each of several peers, all timed in turn; without any, ours alone."""
    mine, *theirs = times([ours, *peers.values()])
    if not peers:
        yield Row(group, name, amount, unit, *mine)
    for peer, found in zip(peers, theirs, strict=True):
        yield Row(group, name, amount, unit, *mine, *found, peer)


def randn(*shape: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype) * scale
