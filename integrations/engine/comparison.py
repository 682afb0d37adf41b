"""Paired differences between methods over pre-trainings and seeds, with confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from wmateacher.integrations.engine.results import identity
from wmateacher.integrations.engine.tables import Columns, Results, aligned, look_up

__all__ = ["Run", "by_pretraining", "differences", "findings", "half_width", "is_above_noise"]

Run = tuple[int, int]
"""The numbers of a run's pre-training and seed."""


def half_width(values: Sequence[float], confidence: float = 0.95) -> float:
    """Return half the width of Student's t interval around the mean; infinite for fewer than two values."""
    from scipy.special import stdtrit

    if len(values) < 2:
        return math.inf
    quantile = float(stdtrit(len(values) - 1, (1 + confidence) / 2))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def differences(results: Results, columns: Columns, pairs: Iterable[tuple[str, str]]) -> str:
    """Return a table with one row for each pair: the mean difference ± half its 95% t interval.

    Differences, one minus other, are taken run by run, over the pre-trainings and seeds that both have. What
    these change for both, such as the data and the start, cancels. With several pre-trainings, a last column
    has the mean difference in each of them, of the last of `columns`: the runs from one pre-training are not
    independent, so an interval over all runs is too narrow if these means disagree.

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
            found = _paired(results, path, one, other)
            row[column] = _cell(list(found.values()), f"+.{digits}f")
        means = by_pretraining(found)
        if len(_pretrainings(results)) > 1:
            cells = (f"{mean:+.{digits}f}" for mean in means.values())
            row[f"{column} in each pre-training"] = "  ".join(cells)
        rows.append(row)
    return aligned(rows) if rows else ""


def findings(results: Results, columns: Columns, reference: str, others: Sequence[str]) -> str:
    """Return one sentence for each column: which methods the reference is above, below, or not told from.

    A difference counts if it `is_above_noise`.

    Args:
        results: The content of `results.json`.
        columns: The columns of `differences`.
        reference: The name of the method that the others are compared with.
        others: The names of the other methods.
    """
    sentences = []
    for column, (path, _) in columns.items():
        found: dict[str, list[str]] = {"above": [], "below": [], "unclear": [], "alone": []}
        runs = 0
        for other in others:
            paired = _paired(results, path, reference, other)
            runs = max(runs, len(paired))
            found[_verdict(paired)].append(other)
        if not runs:
            continue
        if runs == 1:
            sentences.append(f"{column}: one run each, which shows no order; use --seeds.")
            continue
        parts = [
            f"{reference} is {side} {_listed(found[side])}" for side in ("above", "below") if found[side]
        ]
        if found["unclear"]:
            parts.append(f"its difference to {_listed(found['unclear'])} is within the noise")
        if found["alone"]:
            parts.append(f"too few runs of {_listed(found['alone'])}")
        text = "; ".join(parts)
        if not found["above"] and not found["below"]:
            text = text.replace("its difference", f"{reference}'s difference", 1)
        sentences.append(f"{column}, {runs} pairs, 95% intervals: {text}.")
    return "\n".join(sentences)


def is_above_noise(paired: Mapping[Run, float]) -> bool:
    """Return whether the 95% interval of differences excludes 0, with the same sign in every pre-training."""
    values = list(paired.values())
    signs = {value > 0 for value in by_pretraining(paired).values()}
    return len(signs) == 1 and abs(statistics.fmean(values)) > half_width(values)


def _verdict(paired: Mapping[Run, float]) -> str:
    if len(paired) < 2:
        return "alone"
    if not is_above_noise(paired):
        return "unclear"
    return "above" if statistics.fmean(paired.values()) > 0 else "below"


def _listed(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _paired(results: Results, path: str, one: str, other: str) -> dict[Run, float]:
    """Return one minus other for every run that both have."""
    ours, theirs = (_by_run(results, name, path) for name in (one, other))
    return {run: ours[run] - theirs[run] for run in ours if run in theirs}


def _by_run(results: Results, name: str, path: str) -> dict[Run, float]:
    found = {identity(run): look_up(run, path) for run in results["methods"][name]["runs"]}
    return {run: value for run, value in found.items() if value is not None}


def by_pretraining(paired: Mapping[Run, float]) -> dict[int, float]:
    """Return the mean over the seeds of each pre-training, by its number."""
    numbers = sorted({pretraining for pretraining, _ in paired})
    return {n: statistics.fmean(v for (p, _), v in paired.items() if p == n) for n in numbers}


def _pretrainings(results: Results) -> set[int]:
    return {identity(run)[0] for method in results["methods"].values() for run in method["runs"]}


def _cell(values: Sequence[float], form: str) -> str:
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:{form}} (1 seed)"
    width = half_width(values)
    return f"{statistics.fmean(values):{form}} ±{width:{form.replace('+', '')}}"
