"""Results to look at: a table in text, and a picture."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from wmateacher.integrations import report
from wmateacher.integrations.report import Results


def table(results: Results) -> str:
    """One row a method: accuracies in percent, the shifts' mean ECE, seconds of training.

    With several seeds every figure is `mean ± sample deviation`.
    """
    shifts = next(iter(results["methods"].values()))["ood_per_shift"]
    return report.table(
        results,
        {
            "ID": ("id", 1),
            **{shift: (f"ood_per_shift.{shift}", 1) for shift in shifts},
            "mean OOD": ("ood", 1),
            "OOD ECE": ("ece", 3),
            "seconds": ("seconds", 0),
        },
    )


def forgetting_table(results: Results, published: Mapping[str, float]) -> str:
    """Accuracy lost on the first shift since pre-training, beside what the paper reports."""
    methods = results["methods"]
    if "zero-shot" not in methods:
        return "forgetting needs the zero-shot method's result: add it to the methods"
    shift, before = next(iter(methods["zero-shot"]["ood_per_shift"].items()))
    rows = []
    for name, record in methods.items():
        lost = before - record["ood_per_shift"][shift]
        rows.append(
            {
                "method": name,
                f"accuracy on {shift}": f"{record['ood_per_shift'][shift]:.1f}",
                "forgetting": "" if name == "zero-shot" else f"{lost:.1f}",
                "published": f"{published[name]:.1f}" if name in published else "",
            }
        )
    return report.aligned(rows)


def picture(results: Results, gaps: Mapping[str, Path], file: Path) -> None:
    """ID against mean OOD accuracy of every method, and the gap over training of every teacher.

    Args:
        results: As in `results.json`.
        gaps: Method -> a CSV of its teacher's gap, with columns step and gap.
        file: Where to write the picture; its suffix gives the format.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    methods = results["methods"]
    palette = colormaps["tab10" if len(methods) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    colours = {name: palette[i % len(palette)] for i, name in enumerate(methods)}
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    plane, course = figure.subplots(1, 2)
    for name, record in methods.items():
        many = len(record["runs"]) > 1
        plane.errorbar(
            record["id"], record["ood"],
            xerr=record["std"]["id"] if many else None, yerr=record["std"]["ood"] if many else None,
            fmt="o", color=colours[name], label=name, capsize=3, markersize=8,
        )  # fmt: skip
    plane.set(xlabel="ID accuracy (%)", ylabel="mean OOD accuracy (%)", title="In and out of distribution")
    plane.grid(alpha=0.3)
    plane.legend(fontsize="small")
    for name, path in gaps.items():
        steps, values = _read_gaps(path)
        course.plot(steps, values, color=colours[name], label=f"{name}: {_kernel(results, name)}")
    course.set(
        xlabel="optimizer step", ylabel="|W - M| / |W|", title="Distance of the teacher from its student"
    )
    course.grid(alpha=0.3)
    if gaps:
        course.legend(loc="upper left", bbox_to_anchor=(0, -0.12), frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def _kernel(results: Results, method: str) -> str:
    return str(results["config"]["methods"][method]["kernel"])


def _read_gaps(path: Path) -> tuple[list[int], list[float]]:
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    return [int(row["step"]) for row in rows], [float(row["gap"]) for row in rows]
