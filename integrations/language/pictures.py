"""A picture of an experiment: what is learned, what is kept, and the gap between student and teacher."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wmateacher.integrations.language.experiment import Experiment

__all__ = ["draw"]

_PANELS = (
    ("curves", "new", "what is new (% right)"),
    ("curves", "kept", "what is kept (% right)"),
    ("gaps", "gap", "gap |W - M| / |W|"),
)
_LINE = 0.15  # the height of a label, as a share of the panel's


def draw(run: Experiment, names: Sequence[str], file: Path) -> None:
    """Draw the course of every method: the mean over its seeds, and a band of their sample deviation.

    The panels stand in one column, narrow enough for a phone: those of `sft` without and with teachers, then
    those of `sdft` beside `sft`. Lines are labelled at their ends, and a kernel has one colour throughout.

    Args:
        run: The experiment, with the results of all methods.
        names: The names of the methods.
        file: The picture to write; its suffix gives the format.
    """
    from matplotlib.figure import Figure

    labels = dict.fromkeys(map(_label, names))
    colours = {label: f"C{i % 10}" for i, label in enumerate(label for label in labels if label != "sft")}
    colours["sft"] = "black"
    panels = []
    for kind in dict.fromkeys(name.partition(" ")[0] for name in names if name != "sft") or ["sft"]:
        shown = [name for name in names if name == "sft" or name.partition(" ")[0] == kind]
        for what, column, title in _PANELS:
            courses = {name: found for name in shown if (found := _courses(run, name, what, column))}
            if courses:
                panels.append((courses, what, f"{kind}: {title}"))
    figure = Figure(figsize=(4.3, 0.5 + 1.55 * len(panels)), layout="constrained")
    counts = [len(run.results["methods"][name]["runs"]) for name in names]
    seeds = str(max(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    of_seeds = f", mean of {seeds} seeds ± deviation" if max(counts) > 1 else ""
    figure.suptitle(f"On validation questions{of_seeds}", fontsize=9)
    axes = figure.subplots(len(panels), squeeze=False)[:, 0]
    for axis, (courses, what, title) in zip(axes, panels, strict=True):
        ends = {}
        for name, found in courses.items():
            steps = sorted(set.intersection(*map(set, found)))
            values = [[course[step] for course in found] for step in steps]
            means, colour = [statistics.fmean(v) for v in values], colours[_label(name)]
            axis.plot(steps, means, color=colour, linewidth=1.5)
            if len(found) > 1:
                widths = [statistics.stdev(v) for v in values]
                low, high = ([m + sign * w for m, w in zip(means, widths, strict=True)] for sign in (-1, 1))
                axis.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
            ends[_label(name)] = means[-1]
        axis.set_title(title, fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        axis.margins(x=0)
        if what == "curves":
            bottom, top = axis.get_ylim()
            axis.set_ylim(max(bottom, -4), min(top, 104))
        _label_ends(axis, ends, colours)
    axes[-1].set_xlabel("optimizer step", fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=160)


def _label(name: str) -> str:
    """Return the kernel of a method, or its name if it has no teacher."""
    return name.partition(" ")[2] or name


def _courses(run: Experiment, name: str, what: str, column: str) -> list[dict[int, float]]:
    """Return a column by step, for each seed of a method whose table exists."""
    files = [run.file(what, name, record["seed"]) for record in run.results["methods"][name]["runs"]]
    courses = []
    for file in filter(Path.exists, files):  # a method without a teacher has no gap
        with file.open(newline="", encoding="utf-8") as stream:
            courses.append({int(row["step"]): float(row[column]) for row in csv.DictReader(stream)})
    return courses


def _label_ends(axis: Any, ends: Mapping[str, float], colours: Mapping[str, str]) -> None:
    """Write the name of each line beside its end, moved apart where ends are close."""
    bottom, top = axis.get_ylim()
    heights = sorted(((value - bottom) / (top - bottom), label) for label, value in ends.items())
    places: list[float] = []
    for height, _ in heights:
        places.append(max([height, *(place + _LINE for place in places[-1:])]))
    for i in reversed(range(len(places))):
        places[i] = min(places[i], places[i + 1] - _LINE if i + 1 < len(places) else 1.0)
    for place, (height, label) in zip(places, heights, strict=True):
        colour = colours[label]
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.7, "relpos": (0, 0.5), "shrinkA": 0}
        axis.annotate(
            label, (1, height), (1.06, place), "axes fraction", "axes fraction", fontsize=8, color=colour,
            verticalalignment="center", annotation_clip=False, arrowprops=line,
        )  # fmt: skip


def __dir__() -> list[str]:
    return __all__
