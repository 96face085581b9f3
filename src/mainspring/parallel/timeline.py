"""Draws a schedule's timeline, as text and as SVG."""

from __future__ import annotations

from mainspring.parallel.schedule import Timeline

_COLOURS = {"F": "#8ab4f8", "B": "#81c995", "I": "#81c995", "W": "#fdd663"}
_CELL, _ROW, _LEFT = 22, 26, 64


def draw_text(timeline: Timeline) -> str:
    """A line a rank: F with the micro-batch's number, B (or I and W) likewise, dots where the rank waits."""
    width = 1 + max(len(str(a.micro)) for line in timeline.spans for _, _, a in line)
    width += 1 if any(a.stage >= len(timeline.spans) for line in timeline.spans for _, _, a in line) else 0
    lines = []
    for rank, spans in enumerate(timeline.spans):
        cells = ["." * width] * round(timeline.length)
        for start, end, action in spans:
            chunk = action.stage // len(timeline.spans)
            label = f"{action.kind}{action.micro}" + ("'" * chunk if chunk else "")
            for tick in range(round(start), round(end)):
                cells[tick] = (label if tick == round(start) else "-" * len(label)).ljust(width)
        lines.append(f"rank {rank}  {' '.join(cells)}")
    return "\n".join([*lines, f"bubble {timeline.bubble:.1%} of {timeline.length:g}"])


def draw_svg(timeline: Timeline) -> str:
    """The same as a picture, one that any browser shows."""
    width = _LEFT + _CELL * timeline.length + 10
    height = _ROW * (len(timeline.spans) + 1) + 6
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height}" '
        'font-family="sans-serif" font-size="11">'
    ]
    for rank, spans in enumerate(timeline.spans):
        y = rank * _ROW + 4
        parts.append(f'<text x="4" y="{y + 15}">rank {rank}</text>')
        for start, end, action in spans:
            x, w = _LEFT + start * _CELL, (end - start) * _CELL
            chunk = action.stage // len(timeline.spans)
            parts.append(
                f'<rect x="{x:g}" y="{y}" width="{w:g}" height="20" fill="{_COLOURS[action.kind]}" '
                f'fill-opacity="{1.0 - 0.3 * min(chunk, 2):g}" stroke="#5f6368"/>'
                f'<text x="{x + w / 2:g}" y="{y + 14}" text-anchor="middle">{action.kind}{action.micro}</text>'
            )
    y = len(timeline.spans) * _ROW + 18
    parts.append(f'<text x="4" y="{y}">bubble {timeline.bubble:.1%}</text></svg>')
    return "\n".join(parts) + "\n"
