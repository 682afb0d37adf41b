"""A picture of an experiment: what is learned, what is kept, and the gap between student and teacher."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from wmateacher.integrations.language.experiment import Experiment

__all__ = ["draw"]


def draw(run: Experiment, names: Sequence[str], file: Path) -> None:
    """Draw the course of every method with seed 0.

    Args:
        run: The experiment, with the results of all methods.
        names: The names of the methods.
        file: The picture to write; its suffix gives the format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.5), layout="constrained")
    for axis, (what, column, title) in zip(
        figure.subplots(1, 3),
        [
            ("curves", "new", "What is new"),
            ("curves", "kept", "What is kept"),
            ("gaps", "gap", "Gap |W - M| / |W|"),
        ],
        strict=True,
    ):
        for i, name in enumerate(names):
            path = run.file(what, name, 0)
            if not path.exists():  # a method without a teacher has no gap
                continue
            with path.open(newline="", encoding="utf-8") as stream:
                points = [(int(row["step"]), float(row[column])) for row in csv.DictReader(stream)]
            axis.plot(
                *zip(*points, strict=True), color=f"C{i % 10}", linestyle=("-", "--")[i // 10 % 2], label=name
            )
        axis.set(xlabel="optimizer step", title=title, ylabel="" if what == "gaps" else "accuracy (%)")
        axis.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
