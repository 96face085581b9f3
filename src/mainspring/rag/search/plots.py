"""Plots as inline SVG: points over two axes, lines of progress, intervals around zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 16, 16, 44


@dataclass(frozen=True)
class Axis:
    """A stretch of numbers on a stretch of pixels."""

    label: str
    low: float
    high: float
    first: float
    last: float
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value."""
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.first + (value - low) / (high - low) * (self.last - self.first)

    def ticks(self) -> list[float]:
        """Round values within."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            values = [m * 10.0**d for d in decades for m in (1, 2, 5)]
        else:
            step = 10 ** math.floor(math.log10(self.high - self.low))
            step = min(
                (s for s in (step, step / 2, step / 5)), key=lambda s: abs((self.high - self.low) / s - 5)
            )
            values = [step * i for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [v for v in values if self.low <= v <= self.high]


def horizontal(label: str, values: Sequence[float], log: bool = False) -> Axis:
    """An axis along the bottom that holds the values with a margin."""
    return Axis(label, *_range(values, log), _LEFT, WIDTH - _RIGHT, log)


def vertical(label: str, values: Sequence[float]) -> Axis:
    """An axis along the left that holds the values with a margin."""
    return Axis(label, *_range(values, False), HEIGHT - _BOTTOM, _TOP)


@dataclass(frozen=True)
class Point:
    """A dot of a class (`tried`, `front`, ...) with a text that shows under the pointer."""

    x: float
    y: float
    kind: str
    title: str


def scatter(points: Sequence[Point], x: Axis, y: Axis, limit: float, title: str) -> str:
    """Dots, steps along the best y of the front for each x, and a line where the limit of x is."""
    best: list[tuple[float, float]] = []
    for p in sorted((p for p in points if p.kind == "front"), key=lambda p: p.x):
        if not best or p.y > best[-1][1]:
            best += [(p.x, best[-1][1])] if best else []
            best.append((p.x, p.y))
    steps = " ".join(f"{x.at(px):.1f},{y.at(py):.1f}" for px, py in best)
    dots = "".join(
        f'<circle class="{p.kind}" cx="{x.at(p.x):.1f}" cy="{y.at(p.y):.1f}" r="{3 if p.kind == "tried" else 5}">'
        f"<title>{escape(p.title)}</title></circle>"
        for p in sorted(points, key=lambda p: p.kind != "tried")
    )
    at = x.at(limit)
    line = f'<line class="limit" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>'
    return _svg(title, _axes(x, y) + line + f'<polyline class="front" points="{steps}"/>' + dots)


def lines(series: Sequence[tuple[str, Sequence[tuple[float, float]]]], x: Axis, y: Axis, title: str) -> str:
    """One line of a class for each of (class, points)."""
    body = "".join(
        f'<polyline class="{kind}" points="{" ".join(f"{x.at(px):.1f},{y.at(py):.1f}" for px, py in points)}">'
        f"<title>{escape(kind)}</title></polyline>"
        for kind, points in series
    )
    return _svg(title, _axes(x, y) + body)


def intervals(rows: Sequence[tuple[str, float, float, float, str]], label: str, title: str) -> str:
    """One bar for each of (name, low, mean, high, class), and a line at zero."""
    x = Axis(label, *_range([0.0, *(v for row in rows for v in row[1:4])], False), 190, WIDTH - _RIGHT)
    height = _TOP + 36 * len(rows) + _BOTTOM
    body = _ticks_below(x, height)
    body += f'<line class="zero" x1="{x.at(0):.1f}" x2="{x.at(0):.1f}" y1="{_TOP}" y2="{height - _BOTTOM}"/>'
    for number, (name, low, mean, high, kind) in enumerate(rows):
        middle = _TOP + 36 * number + 18
        body += (
            f'<text x="180" y="{middle + 4}" text-anchor="end">{escape(name)}</text>'
            f'<line class="{kind}" x1="{x.at(low):.1f}" x2="{x.at(high):.1f}" y1="{middle}" y2="{middle}"/>'
            f'<circle class="{kind}" cx="{x.at(mean):.1f}" cy="{middle}" r="5"/>'
        )
    return _svg(title, body, height)


def _range(values: Sequence[float], log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return low / 1.2, high * 1.2
    margin = (high - low) * 0.06 or 0.05
    return low - margin, high + margin


def _axes(x: Axis, y: Axis) -> str:
    marks = "".join(
        f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y.at(v):.1f}" y2="{y.at(v):.1f}"/>'
        f'<text x="{_LEFT - 6}" y="{y.at(v) + 4:.1f}" text-anchor="end">{v:g}</text>'
        for v in (round(tick, 10) for tick in y.ticks())
    )
    middle = (_TOP + HEIGHT - _BOTTOM) / 2
    name = (
        f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{escape(y.label)}</text>'
    )
    return _ticks_below(x, HEIGHT) + marks + name


def _ticks_below(x: Axis, height: int) -> str:
    marks = "".join(
        f'<text x="{x.at(v):.1f}" y="{height - _BOTTOM + 16}" text-anchor="middle">{v:g}</text>'
        for v in (round(tick, 10) for tick in x.ticks())
    )
    middle = (x.first + x.last) / 2
    return marks + f'<text x="{middle}" y="{height - 8}" text-anchor="middle">{escape(x.label)}</text>'


def _svg(title: str, body: str, height: int = HEIGHT) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">{body}</svg>'
    )
