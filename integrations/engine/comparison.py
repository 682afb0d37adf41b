"""Paired differences between methods over seeds, with confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from wmateacher.integrations.engine.tables import Columns, Results, aligned, look_up

__all__ = ["differences", "half_width"]


def half_width(values: Sequence[float], confidence: float = 0.95) -> float:
    """Return half the width of Student's t interval around the mean; infinite for fewer than two values."""
    from scipy.special import stdtrit

    if len(values) < 2:
        return math.inf
    quantile = float(stdtrit(len(values) - 1, (1 + confidence) / 2))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def differences(results: Results, columns: Columns, pairs: Iterable[tuple[str, str]]) -> str:
    """Return a table with one row for each pair: the mean difference ± half its 95% t interval.

    Differences, one minus other, are taken seed by seed, over the seeds that both have. What a seed changes
    for both, such as the data and the pre-training, cancels.

    Args:
        results: The content of `results.json`.
        columns: The columns; the cell is empty if one of a pair has no such figure, and names a single seed,
            which has no interval.
        pairs: The names of two methods each: one, and the other. Without any, the text is empty.
    """
    rows = []
    for one, other in pairs:
        row = {"difference": f"{one} - {other}"}
        for column, (path, digits) in columns.items():
            ours, theirs = (_by_seed(results, name, path) for name in (one, other))
            row[column] = _cell([ours[s] - theirs[s] for s in ours if s in theirs], f"+.{digits}f")
        rows.append(row)
    return aligned(rows) if rows else ""


def _by_seed(results: Results, name: str, path: str) -> dict[int, float]:
    found = {run["seed"]: look_up(run, path) for run in results["methods"][name]["runs"]}
    return {seed: value for seed, value in found.items() if value is not None}


def _cell(values: Sequence[float], form: str) -> str:
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:{form}} (1 seed)"
    width = half_width(values)
    return f"{statistics.fmean(values):{form}} ±{width:{form.replace('+', '')}}"
