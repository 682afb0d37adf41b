"""Results for the reader: tables in text with one row for each method, and curves over training."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Columns", "Results", "aligned", "draw_curves", "figure", "look_up", "table"]

Results = Mapping[str, Any]
"""The content of `results.json`."""
Columns = Mapping[str, tuple[str, int]]
"""Heading -> (dotted path in a method's record, digits after the point)."""


def table(results: Results, columns: Columns, heading: str = "method") -> str:
    """Return a table with one row for each method; with several seeds, `mean ± sample deviation`.

    Args:
        results: The content of `results.json`.
        columns: The columns; the cell is empty if a method has no such figure.
        heading: The heading of the first column, the names.
    """
    rows = []
    for name, record in results["methods"].items():
        row = {heading: name}
        row |= {heading: figure(record, path, digits) for heading, (path, digits) in columns.items()}
        rows.append(row)
    return aligned(rows)


def figure(record: Mapping[str, Any], path: str, digits: int) -> str:
    """Return one figure of a method's record as text, with its deviation if there are several seeds.

    Args:
        record: The record of a method.
        path: The dotted path of the figure; the text is empty if the record has no such figure.
        digits: The number of digits after the point.
    """
    value, deviation = look_up(record, path), look_up(record["std"], path)
    if value is None:
        return ""
    return f"{value:.{digits}f}" + (f" ±{deviation:.{digits}f}" if len(record["runs"]) > 1 else "")


def look_up(record: Mapping[str, Any], path: str) -> Any:
    """Return the value at a dotted path, or None if the path does not exist."""
    value: Any = record
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def aligned(rows: Sequence[Mapping[str, str]]) -> str:
    """Return rows of cells under their headings, the first column flush left, the others flush right."""
    first, *rest = rows[0]
    lines = [{k: k for k in rows[0]}, *rows]
    widths = {key: max(len(line[key]) for line in lines) for key in rows[0]}
    return "\n".join(
        "  ".join([line[first].ljust(widths[first]), *(line[k].rjust(widths[k]) for k in rest)]).rstrip()
        for line in lines
    )


def draw_curves(files: Mapping[str, Path], levels: Mapping[str, float], file: Path) -> None:
    """Draw validation accuracy over training, one line for each run.

    Args:
        files: For every name, a CSV file with the columns step and accuracy in percent.
        levels: For every name of a baseline, its accuracy, drawn as a horizontal line.
        file: The picture to write; its suffix gives the format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    what = "accuracy"
    for name, path in files.items():
        with path.open(newline="", encoding="utf-8") as stream:
            (_, what), *rows = csv.reader(stream)
        steps, values = zip(*[(int(step), float(value)) for step, value in rows], strict=True)
        axis.plot(steps, values, marker="o", markersize=3, label=name)
    for i, (name, level) in enumerate(levels.items()):
        axis.axhline(level, color="0.5", linestyle=("--", ":", "-.")[i % 3], label=f"{name} (test)")
    axis.set(xlabel="optimizer step", ylabel=f"{what} (%)", title="On validation images, while training")
    axis.grid(alpha=0.3)
    axis.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
