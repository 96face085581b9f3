"""Latencies as a picture: for each measure the share of requests (or pieces) that took at most that long, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from mainspring.engine.measure.load import Distribution, LoadResult

_WIDTH, _HEIGHT, _MARGIN = 300, 210, 46
_POINTS = 200
_COLOURS = {"p50": "#2a7", "p99": "#c43"}


def latency_svg(result: LoadResult) -> str:
    """The distributions of TTFT, inter-token latency and whole requests, side by side."""
    panels = [
        (title, distribution)
        for title, distribution in (
            ("time to first token", result.ttft),
            ("inter-token latency", result.itl),
            ("whole request", result.e2e),
        )
        if distribution is not None
    ]
    width = max(1, len(panels)) * (_WIDTH + _MARGIN) + _MARGIN
    height = _HEIGHT + 2 * _MARGIN + 24
    drawn = "".join(
        f'<g transform="translate({_MARGIN + index * (_WIDTH + _MARGIN)},{_MARGIN + 24})">'
        f"{_panel(title, distribution)}</g>"
        for index, (title, distribution) in enumerate(panels)
    )
    head = (
        f"{result.model}: {result.completed} requests, {result.output_tokens_per_second:,.0f} output tokens/s, "
        f"{result.requests_per_second:.2f} requests/s, {result.failed} failed"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="11"><rect width="{width}" height="{height}" fill="#fff"/>'
        f'<text x="{_MARGIN}" y="26" font-size="14" fill="#222">{escape(head)}</text>{drawn}</svg>\n'
    )


def _panel(title: str, distribution: Distribution) -> str:
    """One cumulative distribution, with lines at the median and the 99th percentile."""
    top = distribution.max or 1e-9

    def x(value: float) -> float:
        return value / top * _WIDTH

    points = " ".join(
        f"{x(value):.1f},{_HEIGHT * (1 - share):.1f}" for share, value in _steps(distribution.values)
    )
    grid = "".join(
        f'<line x1="0" x2="{_WIDTH}" y1="{_HEIGHT * (1 - share)}" y2="{_HEIGHT * (1 - share)}" stroke="#eee"/>'
        f'<text x="-6" y="{_HEIGHT * (1 - share) + 4}" text-anchor="end" fill="#666">{share:.0%}</text>'
        for share in (0, 0.25, 0.5, 0.75, 1)
    )
    ticks = "".join(
        f'<text x="{_WIDTH * part}" y="{_HEIGHT + 16}" text-anchor="middle" fill="#666">{_seconds(top * part)}</text>'
        for part in (0, 0.5, 1)
    )
    marks = "".join(
        f'<line x1="{x(value):.1f}" x2="{x(value):.1f}" y1="0" y2="{_HEIGHT}" stroke="{_COLOURS[name]}" '
        f'stroke-dasharray="3 3"/><text x="{x(value):.1f}" y="-4" text-anchor="middle" '
        f'fill="{_COLOURS[name]}">{name} {_seconds(value)}</text>'
        for name, value in distribution.percentiles.items()
        if name in _COLOURS
    )
    return (
        f'{grid}{ticks}<polyline points="{points}" fill="none" stroke="#246" stroke-width="1.5"/>{marks}'
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT + 34}" text-anchor="middle" fill="#222">{escape(title)}</text>'
    )


def _steps(ordered: Sequence[float]) -> list[tuple[float, float]]:
    """Points (share, value) of a distribution, thinned out."""
    count = len(ordered)
    places = sorted({round(index * (count - 1) / _POINTS) for index in range(_POINTS + 1)})
    return [(0.0, ordered[0]), *(((place + 1) / count, ordered[place]) for place in places)]


def _seconds(value: float) -> str:
    """A duration in the unit that suits it."""
    if value < 1e-3:
        return f"{value * 1e6:.0f} µs"
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"
