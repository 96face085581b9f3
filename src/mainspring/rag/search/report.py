"""The evidence of a search as one HTML page that needs nothing else: verdict, recipe, plots, tables."""

from __future__ import annotations

from html import escape

from mainspring.rag.search.ledger import Figures
from mainspring.rag.search.plots import Point, horizontal, intervals, lines, scatter, vertical
from mainspring.rag.search.space import changes
from mainspring.rag.search.tune import TuneResult
from mainspring.rag.search.verdict import CONFIDENCE
from mainspring.rag.strategy import to_toml

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c2430;
  background: #fff }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem }
table { border-collapse: collapse; width: 100% } th, td { text-align: left; padding: .3rem .6rem; vertical-align: top;
  border-bottom: 1px solid #d8dde5 } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
pre { background: #f3f5f8; padding: 1rem; overflow: auto }
.verdict { border-left: 4px solid #2563a8; padding-left: 1rem }
svg { width: 100%; max-width: 46rem; height: auto; font: 12px system-ui, sans-serif } svg text { fill: #4a5566 }
polyline { fill: none; stroke-width: 2 } .grid { stroke: #e6e9ef } .zero { stroke: #8a94a3 }
.limit { stroke: #b3261e; stroke-dasharray: 5 4 } circle.tried { fill: #b4bdca } circle.front { fill: #2563a8 }
circle.present { fill: #b36b00 } circle.chosen { fill: #1d7a3e } polyline.front { stroke: #2563a8 }
polyline.beam { stroke: #2563a8 } polyline.greedy { stroke: #b36b00; stroke-dasharray: 6 3 }
line.better, line.worse, line.open { stroke-width: 3 } .better { stroke: #1d7a3e; fill: #1d7a3e }
.worse { stroke: #b3261e; fill: #b3261e } .open { stroke: #8a94a3; fill: #8a94a3 }
@media (prefers-color-scheme: dark) { body { background: #14181e; color: #dde3ea } pre { background: #1d232c }
  th, td { border-color: #323b47 } .grid { stroke: #2a323d } svg text { fill: #a3adba } circle.tried { fill: #55606e } }
"""


_QUALITY = {
    False: "the reciprocal rank of the first passage that holds the question's evidence as the generator would read it",
    True: "the F1 of the answer's words against the question's evidence",
}


def report(result: TuneResult, left_out: int = 0, answers: bool = False) -> str:
    """The page. `left_out`: questions whose evidence is nowhere in the index; `answers`: what quality was."""
    held = len(result.held["present"].outcomes)
    limit = result.settings.limit * 1000
    left = f"; {left_out} more were left out, their evidence is in no passage" if left_out else ""
    body = [
        "<h1>Strategy search</h1>",
        f"<p>{result.searched_questions} questions to search on, {held} held out{left}. Each search: "
        f"{result.beam.spent} evaluations (one strategy on one question), p95 at most {limit:.0f} ms, "
        f"{result.space.size:,} combinations, seed {result.settings.seed}.</p>",
        f'<p class="verdict"><strong>Use: {escape(result.recommendation.name)}.</strong> '
        f"{escape(result.recommendation.reason)}.<br>{escape(changes(result.recommended, result.present))}</p>",
        "<h2>Held-out questions</h2>",
        _held_table(result),
        f"<p>Differences in quality, paired by question, {CONFIDENCE:.1%} intervals (95% for the three together). "
        "Better means that the whole interval lies above zero.</p>",
        _differences(result),
        "<h2>Quality, latency and cost of what was tried</h2>",
        f"<p>On the first {result.beam.figures.questions} questions of the search. The winner was chosen on these, so "
        "its quality here flatters it. Dashed: the limit. Blue: the Pareto front of quality, p95 and cost (the line "
        "joins its best by time); orange: the present strategy; green: the recommended one.</p>",
        _plane(result),
        _front_table(result),
        "<h2>The searches</h2>",
        "<p>Quality of the leading strategy on the questions it had seen then: it falls where more questions correct a "
        "lucky one. Solid: screening, beam and halving; dashed: greedy, module by module. Both spend what is left in "
        "the same way: all questions for their best, then for what else they tried, then for strategies drawn at "
        "random.</p>",
        _progress(result),
        "<h2>The recipe</h2>",
        f"<pre>{escape(to_toml(result.recommended))}</pre>",
        "<h2>The space</h2>",
        f"<pre>{escape(result.space.toml())}</pre>",
        "<h2>How it was measured</h2>",
        f"<p>Quality: {_QUALITY[answers]}. Latency: from the question to the context, generation not included; each "
        "part is timed when its result is first made, one question at a time, on this machine. Cost: characters that "
        "models read for a question. Ways of cutting and embedding that the space does not name are the index's.</p>",
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Strategy search</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _held_table(result: TuneResult) -> str:
    rows = [
        [
            escape(name),
            str(found.quality),
            *_cells(found.figures)[1:],
            escape(changes(found.strategy, result.present)),
        ]
        for name, found in result.held.items()
    ]
    return _table(["strategy", "quality", "p95 ms", "characters", "changes to the present one"], rows)


def _front_table(result: TuneResult) -> str:
    rows = [[*_cells(f), escape(changes(s, result.present))] for s, f in result.front.items()]
    return _table(["quality", "p95 ms", "characters", "changes to the present one"], rows)


def _cells(figures: Figures) -> list[str]:
    return [f"{figures.quality:.3f}", f"{figures.p95 * 1000:.1f}", f"{figures.cost:,.0f}"]


def _table(heads: list[str], rows: list[list[str]]) -> str:
    numbers = {"quality", "p95 ms", "characters"}
    kinds = [' class="n"' if head in numbers else "" for head in heads]
    head = "".join(f"<th{kind}>{name}</th>" for kind, name in zip(kinds, heads, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _differences(result: TuneResult) -> str:
    rows = []
    for c in result.comparisons:
        kind = "better" if c.better else "worse" if c.worse else "open"
        rows.append(
            (f"{c.one} minus {c.other}", c.difference.low, c.difference.mean, c.difference.high, kind)
        )
    return intervals(rows, "difference in quality", "Differences on held-out questions")


def _plane(result: TuneResult) -> str:
    points = []
    for strategy, f in result.tried.items():
        kind = "front" if strategy in result.front else "tried"
        kinds = [kind]
        if strategy == result.present:
            kinds.append("present")
        if strategy == result.recommended:
            kinds.append("chosen")
        title = f"{f.quality:.3f}, {f.p95 * 1000:.1f} ms, {f.cost:,.0f} characters: {changes(strategy, result.present)}"
        points += [Point(max(f.p95 * 1000, 1e-3), f.quality, k, title) for k in kinds]
    limit = result.settings.limit * 1000
    x = horizontal("p95 in ms", [p.x for p in points] + [limit], log=True)
    y = vertical("quality", [p.y for p in points])
    return scatter(points, x, y, limit, "Quality over p95 latency")


def _progress(result: TuneResult) -> str:
    runs = [("beam", result.beam), ("greedy", result.greedy)]
    series = [(name, [(float(p.spent), p.quality) for p in run.progress]) for name, run in runs]
    everything = [point for _, points in series for point in points]
    x = horizontal("evaluations", [0.0, *(p[0] for p in everything)])
    y = vertical("quality", [p[1] for p in everything])
    return lines(series, x, y, "Progress of the searches")
