"""Tables and pictures of results."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wmateacher.integrations.engine import comparison, tables
from wmateacher.integrations.engine.results import identity
from wmateacher.integrations.engine.tables import Results

__all__ = ["COMPARED", "compared", "course", "meaning", "picture", "reliability", "table", "teachers"]

COMPARED = {"ID": ("id", 1), "OOD ECE": ("ece", 3), "mean OOD": ("ood", 1)}
"""The figures whose paired differences are shown."""


def table(results: Results) -> str:
    """Return a table with one row per method: accuracies in percent, the shifts' mean ECE, training seconds.

    With several seeds every figure is `mean ± sample deviation`.
    """
    shifts = next(iter(results["methods"].values()))["ood_per_shift"]
    return tables.table(
        results,
        {
            "ID": ("id", 1),
            **{shift: (f"ood_per_shift.{shift}", 1) for shift in shifts},
            "mean OOD": ("ood", 1),
            "OOD ECE": ("ece", 3),
            "seconds": ("seconds", 0),
        },
    )


def compared(results: Results, reference: str = "tracer") -> str:
    """Return the paired differences of all methods to one of them, and sentences on what they show.

    The text is empty if there is nothing to compare.
    """
    others = [name for name in results["methods"] if name != reference]
    if reference not in results["methods"] or not others:
        return ""
    columns = {
        k: v for k, v in COMPARED.items() if tables.look_up(results["methods"][reference], v[0]) is not None
    }
    table = comparison.differences(results, columns, [(other, reference) for other in others])
    accuracies = {k: v for k, v in columns.items() if k != "OOD ECE"}
    return f"{table}\n\n{comparison.findings(results, accuracies, reference, others)}"


def teachers(results: Results) -> str:
    """Return a table of the teachers' figures, one row per method that has one; empty if none has."""
    having = {n: r for n, r in results["methods"].items() if tables.look_up(r, "teacher.id") is not None}
    if not having:
        return ""
    columns = {"ID": ("teacher.id", 1), "mean OOD": ("teacher.ood", 1), "OOD ECE": ("teacher.ece", 3)}
    return tables.table({"methods": having}, columns, "teacher of")


def picture(results: Results, gaps: Mapping[str, Path], file: Path) -> None:
    """Plot ID against mean OOD accuracy of every method, and the gap of every teacher during training.

    A point is the mean over the method's runs, its bars are their sample deviations.

    Args:
        results: The content of `results.json`.
        gaps: For each method a CSV of its teacher's gap, with columns step and gap.
        file: The file to write; its suffix gives the format.
    """
    from matplotlib.figure import Figure

    methods = results["methods"]
    colours = _colours(list(methods))
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    plane, distance = figure.subplots(1, 2)
    for name, record in methods.items():
        if record["ood"] is None:
            continue
        many = len(record["runs"]) > 1
        plane.errorbar(
            record["id"], record["ood"],
            xerr=record["std"]["id"] if many else None, yerr=record["std"]["ood"] if many else None,
            fmt="o", color=colours[name], label=name, capsize=3, markersize=8,
        )  # fmt: skip
    plane.set(xlabel="ID accuracy (%)", ylabel="mean OOD accuracy (%)", title=meaning(results))
    plane.grid(alpha=0.3)
    if plane.get_legend_handles_labels()[0]:
        plane.legend(fontsize="small")
    for name, path in gaps.items():
        rows = _rows(path)
        steps, values = [int(r["step"]) for r in rows], [float(r["gap"]) for r in rows]
        distance.plot(steps, values, color=colours[name], label=f"{name}: {_kernel(results, name)}")
    distance.set(
        xlabel="optimizer step", ylabel="|W - M| / |W|",
        title="Distance of the teacher from its student (first seed)",
    )  # fmt: skip
    distance.grid(alpha=0.3)
    if gaps:
        distance.legend(loc="upper left", bbox_to_anchor=(0, -0.12), frameon=False)
    _save(figure, file)


def reliability(tables: Mapping[str, Path], in_distribution: str, file: Path) -> None:
    """Plot accuracy over confidence, one panel per method; a calibrated method lies on the diagonal.

    A panel has one line in distribution and one for all shifts together. A point is a bin of confidence that
    holds at least 1% of the images.

    Args:
        tables: For each method a CSV with columns model, set, confidence, accuracy, share.
        in_distribution: The name of the ID set.
        file: The file to write; its suffix gives the format.
    """
    from matplotlib.figure import Figure

    across = min(4, len(tables))
    down = -(-len(tables) // across)
    figure = Figure(figsize=(2.7 * across, 2.7 * down + 0.6), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).ravel()
    for axes, (name, path) in zip(panels, tables.items(), strict=False):
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        rows = [row for row in _rows(path) if row["model"] == "student"]
        for label, inside in (("in distribution", True), ("all shifts", False)):
            points = _pooled([row for row in rows if (row["set"] == in_distribution) == inside])
            if points:
                axes.plot(*zip(*points, strict=True), "o-", markersize=4, linewidth=1, label=label)
        axes.set(title=name, xlim=(0, 1), ylim=(0, 1))
        axes.grid(alpha=0.3)
    for axes in panels[len(tables) :]:
        axes.set_axis_off()
    figure.supxlabel("mean confidence of a bin of test images (first seed)")
    figure.supylabel("their accuracy")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    _save(figure, file)


def _pooled(rows: Sequence[Mapping[str, str]], least: float = 0.01) -> list[tuple[float, float]]:
    """Return (confidence, accuracy) of each tenth of confidence over several sets of equal weight."""
    bins: dict[int, list[tuple[float, float, float]]] = {}
    for row in rows:
        confidence, accuracy, share = (float(row[key]) for key in ("confidence", "accuracy", "share"))
        bins.setdefault(min(int(10 * confidence), 9), []).append((confidence, accuracy, share))
    total = sum(share for found in bins.values() for *_, share in found)
    points = []
    for _, found in sorted(bins.items()):
        weight = sum(share for *_, share in found)
        if weight >= least * total:
            points.append(
                (sum(c * s for c, _, s in found) / weight, sum(a * s for _, a, s in found) / weight)
            )
    return points


def course(tables: Mapping[str, Path], in_distribution: str, file: Path) -> None:
    """Plot ID and mean OOD accuracy of students and teachers during training.

    Args:
        tables: For each method a CSV with columns step, model, set, figure, value.
        in_distribution: The name of the ID set.
        file: The file to write; its suffix gives the format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True)
    colours = _colours(list(tables))
    for name, path in tables.items():
        found = [r for r in _rows(path) if r["figure"] == "accuracy"]
        for side, style in (("student", "o-"), ("teacher", "x--")):
            label = name if side == "student" else None
            for axes, inside in zip(panels, (True, False), strict=True):
                at: dict[int, list[float]] = {}
                for r in found:
                    if r["model"] == side and (r["set"] == in_distribution) == inside:
                        at.setdefault(int(r["step"]), []).append(float(r["value"]))
                if at:
                    means = [sum(values) / len(values) for values in at.values()]
                    axes.plot(list(at), means, style, color=colours[name], label=label, markersize=4)
    for axes, title in zip(panels, (in_distribution, "mean of the shifts"), strict=True):
        axes.set(xlabel="optimizer step (dashed: the teacher)", ylabel="accuracy (%)", title=title)
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    _save(figure, file)


def _colours(methods: Sequence[str]) -> dict[str, Any]:
    from matplotlib import colormaps

    palette = colormaps["tab10" if len(methods) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    return {name: palette[i % len(palette)] for i, name in enumerate(methods)}


def _save(figure: Any, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def meaning(results: Results) -> str:
    """Return what a point of a picture is."""
    runs = [identity(run) for record in results["methods"].values() for run in record["runs"]]
    seeds, pretrainings = len({seed for _, seed in runs}), len({number for number, _ in runs})
    if len(set(runs)) == 1:
        return "A point: a method, one run"
    over = f"{seeds} seeds" if pretrainings == 1 else f"{seeds} seeds x {pretrainings} pre-trainings"
    return f"A point: a method's mean over {over}; bars: sample deviation"


def _kernel(results: Results, method: str) -> str:
    return str(results["config"]["methods"][method]["kernel"])
