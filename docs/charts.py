"""Charts of recorded results for the site, as SVG in the page: one for light, dark and narrow pages."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import Any

from wmateacher.integrations.engine.tables import Results, figure, look_up

FIGURES = (
    {"id": "in distribution (%)", "ood": "under shift, mean (%)"},
    {"teacher.knn": "teacher, nearest neighbours (%)", "teacher.linear": "teacher, linear classifier (%)"},
    {"student.new": "new (%)", "student.kept": "kept (%)"},
    {"accuracy": "test (%)", "student.accuracy": "student (%)"},
)
"""The two figures to show, by path in a method's record: the first pair that every method has."""
WHOLE_RUN = ("tracer", "beta(0.5,0.5)")
"""The ends of the names of the methods that are marked."""
WIDTH, PANEL, INSET, ROW = 390, 187, 8, 27  # the width is a telephone's


def figures(results: Results) -> Mapping[str, str] | None:
    """Return the two figures to show, with their headings, or None if the results have no such pair."""
    records = list(results.get("methods", {}).values())
    for pair in FIGURES:
        if any(all(look_up(record, path) is not None for path in pair) for record in records):
            return pair
    return None


def chart(results: Results) -> str | None:
    """Return a dot plot, one row for each method and one panel for each figure, as one line of HTML.

    A dot is the mean over a method's runs, its bar their sample deviation. Methods of `WHOLE_RUN` stand out,
    with a line through the panel. Colours are the page's own. The chart is None if there is nothing to draw.
    """
    pair = figures(results)
    if pair is None:
        return None
    rows = {
        name: record
        for name, record in results["methods"].items()
        if any(look_up(record, path) is not None for path in pair)
    }
    height = 40 + ROW * len(rows) + 30
    parts = [
        f'<text class="name" x="0" y="{40 + ROW * i + 11}">{escape(name)}</text>'
        f'<line class="rule" x1="0" x2="{WIDTH}" y1="{40 + ROW * (i + 1)}" y2="{40 + ROW * (i + 1)}"/>'
        for i, name in enumerate(rows)
    ]
    for number, (path, heading) in enumerate(pair.items()):
        parts += _panel(rows, path, heading, number * (WIDTH - PANEL))
    counts = sorted({len(record["runs"]) for record in rows.values()})
    runs = f"{counts[0]} to {counts[-1]} runs" if len(counts) > 1 else f"{counts[0]} runs"
    meaning = "One run of each method" if counts == [1] else f"Mean of {runs}; bars: sample deviation"
    parts.append(f'<text class="note" x="0" y="11">{meaning}</text>')
    return (
        f'<div class="chart" data-search-exclude><svg viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(" and ".join(pair.values()))} by method">{"".join(parts)}</svg></div>'
    )


def _panel(rows: Mapping[str, Mapping[str, Any]], path: str, heading: str, left: float) -> list[str]:
    """Return one figure of every method, in a panel that starts at `left`."""
    found = {
        name: (value, (look_up(record["std"], path) or 0) if len(record["runs"]) > 1 else 0)
        for name, record in rows.items()
        if (value := look_up(record, path)) is not None
    }
    low = min(value - deviation for value, deviation in found.values())
    high = max(value + deviation for value, deviation in found.values())
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5

    def place(value: float) -> float:
        return left + INSET + (PANEL - 2 * INSET) * (value - low) / (high - low)

    bottom = 40 + ROW * len(rows)
    parts = [f'<text class="heading" x="{left + PANEL / 2}" y="31">{heading}</text>']
    for tick in _ticks(low, high):
        x = f"{place(tick):.1f}"
        parts.append(f'<line class="tick" x1="{x}" x2="{x}" y1="40" y2="{bottom + 4}"/>')
        parts.append(f'<text class="number" x="{x}" y="{bottom + 17}">{tick:g}</text>')
    for i, name in enumerate(rows):
        if name not in found:
            continue
        value, deviation = found[name]
        y, marked = 40 + ROW * i + 19, name.endswith(WHOLE_RUN)
        if marked:
            x = f"{place(value):.1f}"
            parts.append(f'<line class="marked guide" x1="{x}" x2="{x}" y1="40" y2="{bottom}"/>')
        low_end, high_end = place(value - deviation), place(value + deviation)
        bar = f'<line x1="{low_end:.1f}" x2="{high_end:.1f}" y1="{y}" y2="{y}"/>'
        parts.append(
            f'<g class="{"marked" if marked else "method"}">{bar if deviation else ""}'
            f'<circle cx="{place(value):.1f}" cy="{y}" r="4"/>'
            f"<title>{escape(name)}: {figure(rows[name], path, 1)}</title></g>"
        )
    return parts


def _ticks(low: float, high: float) -> list[float]:
    """Return up to five round numbers between two."""
    rough = (high - low) / 4
    power = 10 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= rough)
    return [round(step * k, 9) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
