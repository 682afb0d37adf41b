"""Tables and pictures of results."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wmateacher.integrations.engine import tables
from wmateacher.integrations.engine.tables import Results

__all__ = ["course", "picture", "reliability", "table", "teachers"]


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


def teachers(results: Results) -> str:
    """Return a table of the teachers' figures, one row per method that has one; empty if none has."""
    having = {n: r for n, r in results["methods"].items() if tables.look_up(r, "teacher.id") is not None}
    if not having:
        return ""
    columns = {"ID": ("teacher.id", 1), "mean OOD": ("teacher.ood", 1), "OOD ECE": ("teacher.ece", 3)}
    return tables.table({"methods": having}, columns, "teacher of")


def picture(results: Results, gaps: Mapping[str, Path], file: Path) -> None:
    """Plot ID against mean OOD accuracy of every method, and the gap of every teacher during training.

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
    plane.set(xlabel="ID accuracy (%)", ylabel="mean OOD accuracy (%)", title="In and out of distribution")
    plane.grid(alpha=0.3)
    if plane.get_legend_handles_labels()[0]:
        plane.legend(fontsize="small")
    for name, path in gaps.items():
        rows = _rows(path)
        steps, values = [int(r["step"]) for r in rows], [float(r["gap"]) for r in rows]
        distance.plot(steps, values, color=colours[name], label=f"{name}: {_kernel(results, name)}")
    distance.set(
        xlabel="optimizer step", ylabel="|W - M| / |W|", title="Distance of the teacher from its student"
    )
    distance.grid(alpha=0.3)
    if gaps:
        distance.legend(loc="upper left", bbox_to_anchor=(0, -0.12), frameon=False)
    _save(figure, file)


def reliability(tables: Mapping[str, Path], file: Path) -> None:
    """Plot accuracy over confidence on every test set; calibrated methods lie on the diagonal.

    The size of a point shows the share of images in its bin.

    Args:
        tables: For each method a CSV with columns model, set, confidence, accuracy, share.
        file: The file to write; its suffix gives the format.
    """
    from matplotlib.figure import Figure

    rows = {name: _rows(path) for name, path in tables.items()}
    tests = list(dict.fromkeys(row["set"] for found in rows.values() for row in found))
    across = min(4, len(tests))
    down = -(-len(tests) // across)
    figure = Figure(figsize=(3.2 * across + 1.8, 3.2 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).ravel()
    colours = _colours(list(rows))
    for axes, test in zip(panels, tests, strict=False):
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        for name, found in rows.items():
            for side, style in (("student", "-"), ("teacher", "--")):
                bins = [r for r in found if r["set"] == test and r["model"] == side]
                if bins:
                    at = [[float(r[key]) for r in bins] for key in ("confidence", "accuracy")]
                    sizes = [4 + 60 * float(r["share"]) for r in bins]
                    axes.plot(*at, style, color=colours[name], linewidth=1)
                    axes.scatter(*at, s=sizes, color=colours[name], label=name if side == "student" else None)
        axes.set(title=test, xlim=(0, 1), ylim=(0, 1))
        axes.grid(alpha=0.3)
    for axes in panels[len(tests) :]:
        axes.set_axis_off()
    figure.supxlabel("confidence (dashed: the teacher)")
    figure.supylabel("accuracy")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    _save(figure, file)


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


def _kernel(results: Results, method: str) -> str:
    return str(results["config"]["methods"][method]["kernel"])
