"""How runs went, to look at."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path


def picture(files: Mapping[str, Path], levels: Mapping[str, float], file: Path) -> None:
    """Accuracy on validation images over training, one line a run.

    Args:
        files: Name -> CSV, its columns the step and an accuracy in percent.
        levels: Name -> accuracy of what is not trained, drawn across.
        file: Where to write the picture; its suffix gives the format.
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
