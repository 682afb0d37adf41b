"""Results to read: tables in text, one row a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Results = Mapping[str, Any]
Columns = Mapping[str, tuple[str, int]]
"""Heading -> (dotted path in a method's record, digits after the point)."""


def table(results: Results, columns: Columns, heading: str = "method") -> str:
    """One row a method; with several seeds every figure is `mean ± sample deviation`.

    Args:
        results: As in `results.json`.
        columns: What to show; a figure that a method does not have is left blank.
        heading: Of the names.
    """
    rows = []
    for name, record in results["methods"].items():
        row = {heading: name}
        row |= {heading: figure(record, path, digits) for heading, (path, digits) in columns.items()}
        rows.append(row)
    return aligned(rows)


def figure(record: Mapping[str, Any], path: str, digits: int) -> str:
    """One figure of a method's record, with its deviation over several seeds; blank where there is none."""
    value, deviation = look_up(record, path), look_up(record["std"], path)
    if value is None:
        return ""
    return f"{value:.{digits}f}" + (f" ±{deviation:.{digits}f}" if len(record["runs"]) > 1 else "")


def look_up(record: Mapping[str, Any], path: str) -> Any:
    """What stands at a dotted path; None where nothing does."""
    value: Any = record
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def aligned(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows of cells under their headings, the first column to the left, the others to the right."""
    first, *rest = rows[0]
    lines = [{k: k for k in rows[0]}, *rows]
    widths = {key: max(len(line[key]) for line in lines) for key in rows[0]}
    return "\n".join(
        "  ".join([line[first].ljust(widths[first]), *(line[k].rjust(widths[k]) for k in rest)]).rstrip()
        for line in lines
    )
