"""What must be reached and what is wanted: each bar computed from the rows of a run."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from kernel_groups.timing import Row

LOWEST_CELL = 0.75  # of a grid, against its peer
LARGE_CACHE = 0.256  # GB of keys and values from which the bar of paged decode holds


@dataclass(frozen=True)
class Bar:
    """One line: `measured` and its limits in `unit`. lowest: the worst cell of a grid against its peer, or None."""

    name: str
    unit: str
    measured: float
    must: float | None
    goal: float | None
    lowest: float | None = None

    @property
    def met(self) -> bool:
        """Whether what must be reached is, in the mean and in every cell."""
        return (self.must is None or self.measured >= self.must) and (
            self.lowest is None or self.lowest >= LOWEST_CELL
        )

    @property
    def goal_met(self) -> bool | None:
        """Whether what is wanted is reached; None where there is no goal."""
        return None if self.goal is None else self.measured >= self.goal

    def text(self) -> str:
        must, goal = ("-" if x is None else self._value(x) for x in (self.must, self.goal))
        lowest = "" if self.lowest is None else f"  lowest cell {self.lowest:.2f}x"
        verdict = "met" if self.met else "NOT MET"
        wanted = {None: "", True: ", goal met", False: ", goal not met"}[self.goal_met]
        return (
            f"{self.name:52} must {must:>11}  goal {goal:>11}  measured {self._value(self.measured):>11}  "
            f"{verdict}{wanted}{lowest}"
        )

    def _value(self, x: float) -> str:
        return {"x": f"{x:.3f}x", "share": f"{x:.1%}", "TFLOP/s": f"{x:.0f} TFLOP/s"}[self.unit]


def bars(rows: Sequence[Row], ceilings: Mapping[str, float]) -> list[Bar]:
    """The bars whose rows were measured. ceilings: rates by unit, as `Row.share` takes them."""
    return [
        *_attention(rows), *_decode(rows, ceilings), *_linear(rows), *_loss(rows), *_rowwise(rows, ceilings),
        *_optimizers(rows), *_experts(rows),
    ]  # fmt: skip


def _ratios(rows: Iterable[Row], group: str, name: str, peer: str) -> list[float]:
    """Ratios to a peer of the group's rows whose names match from their first letter on."""
    return [
        r.ratio
        for r in rows
        if r.ratio is not None and r.group == group and r.peer_name == peer and re.match(name, r.name)
    ]


def _mean(
    name: str, ratios: Sequence[float], must: float | None, goal: float | None, grid: bool = True
) -> Iterator[Bar]:
    """The geometric mean, where there is anything to take one of."""
    if ratios:
        lowest = min(ratios) if grid else None
        yield Bar(name, "x", statistics.geometric_mean(ratios), must, goal, lowest)


def _attention(rows: Sequence[Row]) -> Iterator[Bar]:
    for kernel, group, peer, must, goal in (
        ("cuda", "forward", "cuDNN", 0.90, 1.05),
        ("cuda", "backward", "cuDNN", 0.85, 1.0),
        ("triton", "forward", "flash2", 1.25, None),
        ("triton", "forward", "cuDNN", None, 0.92),
        ("triton", "backward", "flash2", 1.1, 1.4),
    ):
        found = _ratios(rows, group, rf"{kernel} d(64|128) ", peer)
        yield from _mean(f"{kernel} attention {group} against {peer}", found, must, goal)
    for d, must in ((128, 0.93), (64, 0.88)):
        found = _ratios(rows, "forward", f"cuda, canonical d{d} ", "own free order")
        yield from _mean(f"canonical attention d {d} against own free order", found, must, 0.98)


def _decode(rows: Sequence[Row], ceilings: Mapping[str, float]) -> Iterator[Bar]:
    large = [
        r for r in rows if r.group == "decode" and re.match(r"cuda d\d+ ", r.name) and r.amount >= LARGE_CACHE
    ]
    yield from _least("paged decode, 256 MB and more, share of the copy", large, ceilings, 0.88, 0.93)


def _linear(rows: Sequence[Row]) -> Iterator[Bar]:
    for name, few, many, must, goal in (
        ("M >= 2048", 2048, None, 0.90, 0.97),
        ("M 128 to 1024", 128, 1024, 0.88, 0.95),
        ("M <= 64", 1, 64, 0.92, 1.05),
    ):
        found = [
            r.ratio
            for r in rows
            if r.group == "linear" and r.ratio is not None and r.peer_name == "cuBLAS"
            and (m := re.match(r"M=(\d+) ", r.name)) is not None
            and few <= int(m[1]) and (many is None or int(m[1]) <= many)
        ]  # fmt: skip
        yield from _mean(f"canonical GEMM, {name}, against cuBLAS", found, must, goal)


def _loss(rows: Sequence[Row]) -> Iterator[Bar]:
    for h, must, goal in ((2048, 480, 560), (4096, 540, 620)):
        rates = [r.rate for r in rows if r.group == "loss" and f" H={h} " in r.name]
        if rates:
            yield Bar(f"linear + cross-entropy, H {h}", "TFLOP/s", min(rates), must, goal)


def _rowwise(rows: Sequence[Row], ceilings: Mapping[str, float]) -> Iterator[Bar]:
    named = [r for r in rows if r.group == "rowwise" and re.match("(add_)?rms_norm|swiglu|rope", r.name)]
    backward = [r for r in named if r.name.endswith("backward")]
    forward = [r for r in named if r not in backward]
    yield from _least("norms, SwiGLU, RoPE forward, share of the copy", forward, ceilings, 0.85, 0.93)
    yield from _least("norms, SwiGLU, RoPE backward, share of the copy", backward, ceilings, 0.80, 0.90)


def _optimizers(rows: Sequence[Row]) -> Iterator[Bar]:
    for group, peer, must, goal in (
        ("adamw", "torch fused", 1.05, 1.12),
        ("muon", "torch.optim.Muon", 1.6, 1.95),
    ):
        found = _ratios(rows, group, "822M float32", peer)
        yield from _mean(f"{group}, 822M parameters, against {peer}", found, must, goal, grid=False)


def _experts(rows: Sequence[Row]) -> Iterator[Bar]:
    found = _ratios(rows, "experts", r"\d+ experts top \d+ K=\d+ N=\d+$", "grouped_mm")
    yield from _mean("grouped GEMM against grouped_mm", found, 1.0, 1.2)


def _least(
    name: str, rows: Sequence[Row], ceilings: Mapping[str, float], must: float, goal: float
) -> Iterator[Bar]:
    """The smallest share of a ceiling."""
    shares = [share for r in rows if (share := r.share(ceilings)) is not None]
    if shares:
        yield Bar(name, "share", min(shares), must, goal)
