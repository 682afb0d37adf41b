"""Turn the results of a sweep into a table, CSV, pictures and one HTML page."""

from __future__ import annotations

import base64
import csv
import html
import statistics
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from wmateacher import kernels, theory
from wmateacher.integrations.engine.comparison import by_pretraining, half_width, is_above_noise
from wmateacher.integrations.engine.results import write_csv
from wmateacher.integrations.engine.tables import aligned

Row = dict[str, Any]
Figures = dict[str, tuple[str, int]]
BASELINE = "beta(0.5,0.5)"
EXPLAINED = {
    "id": "ID: accuracy on the domain of fine-tuning (%)",
    "ood": "OOD: mean accuracy on the shifted domains (%)",
    "knn": "teacher: accuracy by nearest neighbours (%)",
    "linear": "teacher: accuracy of a linear classifier (%)",
    "accuracy": "teacher: accuracy on test images (%)",
    "student_accuracy": "student: accuracy on test images (%)",
    "new": "new: accuracy on what was to be learned (%)",
    "kept": "kept: accuracy on what was known before (%)",
}
THEMES = {"": "default", "-dark": "dark_background"}
"""The ending of a picture's name and its style: of light pages, of dark ones."""
CLIP_FIGURES: Figures = {
    "id": ("ID", 1), "ood": ("OOD", 1), "ece": ("OOD ECE", 3), "final_gap": ("final gap", 4)
}  # fmt: skip


def figures(results: dict[str, Any]) -> Figures:
    """Return heading and number of digits by key; the first two keys are the axes of the plane."""
    return results.get("figures", CLIP_FIGURES)


def rows(results: dict[str, Any]) -> list[Row]:
    """Return a row per kernel and weight: means and deviations over seeds, and the kernel's summary."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for cell in results["cells"]:
        groups.setdefault((cell["kernel"], cell["distill_weight"]), []).append(cell)
    found = []
    for (kernel, distill_weight), cells in groups.items():
        row: Row = {"kernel": kernel, "distill_weight": distill_weight, "seeds": len(cells)}
        for key in figures(results):
            values = [c[key] for c in cells if c[key] is not None]
            row[key] = statistics.fmean(values) if values else None
            row[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
        if has_profile(kernel):
            summary = kernels.build(kernel).summary(results["config"]["total_steps"])
            row["start_weight"] = summary.start_weight
            row["mean_age"] = summary.mean_age / results["config"]["total_steps"]
        row["gaps"] = cells[0]["gaps"]
        found.append(row)
    axes = list(figures(results))[:2]
    for row in found:
        row["front"] = not any(dominates(other, row, axes) for other in found)
    return found


def has_profile(kernel: str) -> bool:
    """Return whether a kernel's weights are known before the run."""
    return kernel != "none" and not isinstance(kernels.build(kernel), kernels.Gap)


def paired(results: dict[str, Any], row: Row, baseline: str, key: str) -> dict[tuple[int, int], float]:
    """Return the differences of a row and the baseline, over the pre-trainings and seeds that both have.

    The baseline has the same distillation weight. Runs without a teacher have none and are compared with the
    first weight of the sweep.
    """

    def values(kernel: str, weight: float) -> dict[tuple[int, int], float]:
        return {
            (cell.get("pretraining", 0), cell["seed"]): cell[key]
            for cell in results["cells"]
            if (cell["kernel"], cell["distill_weight"]) == (kernel, weight) and cell[key] is not None
        }

    ours = values(row["kernel"], row["distill_weight"])
    theirs = values(baseline, row["distill_weight"])
    return {run: ours[run] - theirs[run] for run in ours if run in theirs}


def differences(results: dict[str, Any], baseline: str = BASELINE) -> str:
    """Return a table of the mean paired differences to the baseline ± half their 95% t interval.

    A `!` marks what is above noise. If the sweep has no runs in pairs, a sentence says what is missing. With
    several pre-trainings, the last columns have the mean differences of the first two figures in each of
    them: the runs from one pre-training are not independent.
    """
    lines = []
    several = len({cell.get("pretraining", 0) for cell in results["cells"]}) > 1
    most = 0
    for row in rows(results):
        name = _label(row, rows(results))
        pairs = paired(results, row, baseline, next(iter(figures(results))))
        line: dict[str, Any] = {f"minus {baseline}": name, "pairs": str(len(pairs) or "")}
        for key, (heading, digits) in figures(results).items():
            found = paired(results, row, baseline, key)
            most = max(most, len(found))
            if row["kernel"] == baseline or not found:
                line[heading] = ""
                continue
            width = half_width(list(found.values()))
            mark = "!" if is_above_noise(found) else " "
            line[heading] = f"{statistics.fmean(found.values()):+.{digits}f} ±{width:.{digits}f}{mark}"
        for key, (heading, digits) in list(figures(results).items())[: 2 if several else 0]:
            means = by_pretraining(paired(results, row, baseline, key)).values()
            line[f"{heading} in each pre-training"] = "  ".join(f"{mean:+.{digits}f}" for mean in means)
        if row["kernel"] != baseline:
            lines.append(line)
    if not lines or not most:
        return f"No run of {baseline} to compare with."
    if most < 2:
        return (
            "One run of each kernel, which shows no order: the noise is unknown. Use --seeds, --pretrainings."
        )
    return aligned(lines)


def correlations(results: dict[str, Any]) -> str:
    """Return a table of rank correlations between the linear theory's numbers and the measured ones."""
    compared = [row for row in rows(results) if row["final_gap"] is not None and "start_weight" in row]
    predicted: dict[str, list[float]] = {}
    for row in compared:
        for name, value in outlook(row, results["config"]["total_steps"]).items():
            predicted.setdefault(name, []).append(value)
    lines = []
    for name, values in predicted.items():
        line: dict[str, Any] = {f"{len(compared)} kernels": name}
        for key, (heading, _) in figures(results).items():
            line[heading] = _rank(values, [row[key] for row in compared])
        lines.append(line)
    return aligned(lines) if lines else "No teacher to predict."


def _rank(expected: Sequence[float], measured: Sequence[float]) -> str:
    """Return the rank correlation as text; nothing where values do not differ or are fewer than three."""
    if len(expected) < 3 or len(set(expected)) < 2 or len(set(measured)) < 2:
        return ""
    return f"{spearmanr(expected, measured).statistic + 0.0:+.2f}"


def outlook(row: Row, total_steps: int) -> dict[str, float]:
    """Return what the linear theory with SGD's noise says about a row: the mean over its eigenvalues."""
    run = theory.reference_run(row["kernel"], total_steps, row["distill_weight"])
    return {
        "student's bias": float(np.sqrt(np.mean(run.student_bias**2))),
        "teacher's bias": float(np.sqrt(np.mean(run.teacher_bias**2))),
        "student's noise": float(np.mean(run.student_variance)),
        "teacher's noise": float(np.mean(run.teacher_variance)),
        "gap": float(np.sqrt(np.mean((run.teacher_bias - run.student_bias) ** 2))),
    }


def dominates(one: Row, other: Row, axes: list[str]) -> bool:
    """Return whether `one` is at least as good on both axes of the plane, and better on one."""
    mine, theirs = ([row[axis] for axis in axes] for row in (one, other))
    return mine != theirs and all(a >= b for a, b in zip(mine, theirs, strict=True))


def table(results: dict[str, Any]) -> str:
    """Return an aligned table; `*` marks the Pareto front of the first two figures."""
    lines = [[name for name, _ in cells(rows(results)[0], figures(results))]]
    lines += [[value for _, value in cells(row, figures(results))] for row in rows(results)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )


def cells(row: Row, shown: Figures) -> list[tuple[str, str]]:
    """Return the names and texts of a row's cells."""

    def figure(key: str, digits: int) -> str:
        if row[key] is None:
            return ""
        deviation = f" ±{row[f'{key}_std']:.{digits}f}" if row["seeds"] > 1 else ""
        return f"{row[key]:.{digits}f}{deviation}"

    return [
        ("kernel", row["kernel"]),
        ("weight", f"{row['distill_weight']:g}" if row["kernel"] != "none" else ""),
        ("front", "*" if row["front"] else ""),
        *((name, figure(key, digits)) for key, (name, digits) in shown.items()),
        ("weight of W^0", f"{row['start_weight']:.4f}" if "start_weight" in row else ""),
        ("mean age / T", f"{row['mean_age']:.3f}" if "mean_age" in row else ""),
    ]


def write(results: dict[str, Any], output: Path, theory: bool = True, baseline: str = BASELINE) -> None:
    """Write cells.csv, the pictures for light and dark pages, and report.html beside results.json."""
    found = rows(results)
    header = ["kernel", "distill_weight", "pretraining", "seed", *figures(results), "seconds"]
    lines = (
        [cell.get(key, 0 if key == "pretraining" else None) for key in header] for cell in results["cells"]
    )
    write_csv(header, lines, output / "cells.csv")
    drawings: dict[str, Callable[[], Any]] = {
        "plane": lambda: plane(found, figures(results)),
        "differences": lambda: difference_picture(results, baseline),
        "profiles": lambda: profiles(found, results["config"]["total_steps"]),
        "gaps": lambda: gaps(found, output),
    }
    if theory:
        drawings["predicted"] = lambda: predicted(found, results["config"]["total_steps"])
    drawn = [name for name, draw in drawings.items() if _draw(name, draw, output)]
    (output / "report.html").write_text(page(results, found, output, drawn, baseline), "utf-8")


def _draw(name: str, draw: Callable[[], Any], output: Path) -> bool:
    """Draw a picture in both themes; return whether there is one."""
    from matplotlib import style

    for ending, theme in THEMES.items():
        with style.context([theme, {"font.size": 8}]):
            figure = draw()
            if figure is None:
                return (output / f"{name}.png").exists()
            figure.savefig(output / f"{name}{ending}.png", dpi=_DPI)
    return True


def plane(found: list[Row], shown: Figures) -> Any:
    """Draw the first figure against the second, with the Pareto front."""
    figure, axis = _figure(5.6)
    x, y, *_ = shown
    front = sorted((r for r in found if r["front"]), key=lambda r: r[x])
    axis.plot([r[x] for r in front], [r[y] for r in front], color="0.5", linewidth=1, zorder=0)
    for i, row in enumerate(found):
        many = row["seeds"] > 1
        axis.errorbar(
            row[x], row[y],
            xerr=row[f"{x}_std"] if many else None, yerr=row[f"{y}_std"] if many else None,
            label=_label(row, found), elinewidth=0.6, **_marker(i),
            markeredgecolor=axis.xaxis.label.get_color() if row["front"] else "none",
        )  # fmt: skip
    title = "Outlined: no other kernel is better in both"
    if any(row["seeds"] > 1 for row in found):
        title += "; bars: one deviation"
    axis.set(xlabel=_explained(x, shown), ylabel=_explained(y, shown), title=title)
    axis.locator_params(axis="x", nbins=6)
    _finish(figure, axis)
    return figure


def difference_picture(results: dict[str, Any], baseline: str) -> Any:
    """Draw the paired differences to the baseline in the first two figures, with their 95% intervals."""
    found = [row for row in rows(results) if row["kernel"] != baseline]
    shown = list(figures(results))[:2]
    if not any(len(paired(results, row, baseline, shown[0])) > 1 for row in found):
        return None
    figure, axes = _figure(0.29 * len(found) + 1.3, columns=2)
    for axis, key in zip(axes, shown, strict=True):
        for place, row in enumerate(found):
            values = paired(results, row, baseline, key)
            if len(values) > 1:
                axis.errorbar(
                    statistics.fmean(values.values()), place, xerr=half_width(list(values.values())), fmt="o",
                    markersize=4, elinewidth=1, color="C1" if is_above_noise(values) else "0.5",
                )  # fmt: skip
        axis.axvline(0, color="0.5", linewidth=0.8, zorder=0)
        title = _explained(key, figures(results)).replace("(%)", "(points)")
        axis.set_title(textwrap.fill(title, 27), fontsize=7)
        axis.set_ylim(len(found) - 0.5, -0.5)
        axis.grid(alpha=0.3, axis="x")
    names = [_label(row, found) for row in found]
    names = ["\n".join(textwrap.wrap(name.replace(",", ", "), 24)).replace(", ", ",") for name in names]
    axes[0].set_yticks(range(len(found)), names, fontsize=6)
    axes[1].set_yticks(range(len(found)), [""] * len(found))
    figure.suptitle(f"Difference to {baseline}, 95% intervals\n(coloured: above noise)", fontsize=8)
    return figure


def profiles(found: list[Row], total_steps: int) -> Any:
    """Draw the final weight of every student state, relative to the uniform kernel's."""
    figure, axis = _figure(5.2)
    names = list(dict.fromkeys(r["kernel"] for r in found if "start_weight" in r))
    for i, name in enumerate(names):
        weights = kernels.build(name).profile(total_steps) * (total_steps + 1)
        steps = [k / total_steps for k in range(total_steps + 1)]
        axis.plot(steps, weights, label=name, linewidth=1, **_line(i))
    axis.set(xlabel="step / T", ylabel="weight x (T + 1)", yscale="symlog", title="What each kernel averages")
    _finish(figure, axis)
    return figure


def gaps(found: list[Row], output: Path) -> Any:
    """Draw the distance between each teacher and its student during training, for the first run."""
    figure, axis = _figure(5.2)
    for i, row in enumerate(r for r in found if r["gaps"] and (output / r["gaps"]).exists()):
        with (output / row["gaps"]).open(newline="", encoding="utf-8") as stream:
            course = [(int(line["step"]), float(line["gap"])) for line in csv.DictReader(stream)]
        steps, values = zip(*course, strict=True)
        axis.plot(steps, values, label=_label(row, found), linewidth=1, **_line(i))
    if not axis.has_data():
        return None
    axis.set(xlabel="optimizer step", ylabel="|W - M| / |W|", yscale="log", title="Teacher-student distance")
    _finish(figure, axis)
    return figure


def predicted(found: list[Row], total_steps: int) -> Any:
    """Draw the final gap against the gap that the linear theory predicts from kernel and distill_weight."""
    figure, axis = _figure(5.6)
    compared = [(i, r) for i, r in enumerate(found) if r["final_gap"] and "start_weight" in r]
    points = [(outlook(row, total_steps)["gap"], row["final_gap"]) for _, row in compared]
    for (expected, measured), (i, row) in zip(points, compared, strict=True):
        axis.plot(max(expected, 1e-6), measured, label=_label(row, found), **_marker(i))
    title = "Final distance of teacher and student"
    if rank := _rank(*zip(*points, strict=True)) if points else "":
        title += f": rank correlation {rank.lstrip('+')}"
    axis.set(
        xlabel="predicted by the linear theory (clipped at 1e-6)",
        ylabel="measured |W - M| / |W|", xscale="log", yscale="log", title=title,
    )  # fmt: skip
    _finish(figure, axis)
    return figure


def page(
    results: dict[str, Any], found: list[Row], output: Path, pictures: Iterable[str], baseline: str = BASELINE
) -> str:
    """Return one self-contained HTML page."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name, _ in cells(found[0], figures(results)))
    body = "".join(
        f"<tr{' class=front' if row['front'] else ''}>"
        + "".join(f"<td>{html.escape(value)}</td>" for _, value in cells(row, figures(results)))
        + "</tr>"
        for row in found
    )
    images = "".join(_image(output, name) for name in pictures)
    compared = html.escape(differences(results, baseline))
    explained = "; ".join(_explained(key, figures(results)) for key in list(figures(results))[:2])
    axes = " and ".join(name for name, _ in list(figures(results).values())[:2])
    facts = {**results["config"], **results["environment"]["packages"]}
    facts["processor"] = results["environment"]["processor"]
    listed = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in facts.items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Kernel sweep: {html.escape(results["config"]["task"])}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }}
div.table {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #8884; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; font-family: ui-monospace, monospace; }}
tr.front {{ font-weight: 600; }}
img {{ max-width: min(100%, 34rem); margin: 1rem 0; display: block; }}
pre {{ overflow-x: auto; font-size: .8rem; }}
dl {{ display: grid; grid-template-columns: max-content auto; gap: .1rem 1rem; }}
dd {{ margin: 0; }}
</style></head><body>
<h1>Kernel sweep: {html.escape(results["config"]["task"])} on {html.escape(results["config"]["data"])}</h1>
<p>Accuracies in percent, ECE in [0, 1]; bold: no other kernel is better in both {axes}.
{html.escape(explained)}. <a href="explorer.html">explorer.html</a> shows them point by point.</p>
<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>
<p>Mean paired differences to {html.escape(baseline)} over pre-trainings and seeds, with half their 95% t
interval; ! marks intervals that exclude 0 with the same sign in every pre-training. One interval in twenty
excludes 0 by chance.</p>
<pre>{compared}</pre>
{images}
<h2>Configuration and versions</h2><dl>{listed}</dl>
</body></html>
"""


def _label(row: Row, found: list[Row]) -> str:
    many = len({r["distill_weight"] for r in found}) > 1 and row["kernel"] != "none"
    return f"{row['kernel']} x{row['distill_weight']:g}" if many else row["kernel"]


def _image(output: Path, name: str) -> str:
    """Return a picture as HTML, with its dark variant if there is one."""

    def encoded(file: Path) -> str:
        return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"

    dark, image = output / f"{name}-dark.png", f'<img alt="{name}" src="{encoded(output / f"{name}.png")}">'
    if not dark.exists():
        return image
    return f'<picture><source media="(prefers-color-scheme: dark)" srcset="{encoded(dark)}">{image}</picture>'


def _explained(key: str, shown: Figures) -> str:
    return EXPLAINED.get(key, f"{shown[key][0]} (%)")


def _marker(i: int) -> dict[str, Any]:
    return {"marker": "os^D"[i // 10 % 4], "linestyle": "none", "color": f"C{i % 10}", "markersize": 5}


def _line(i: int) -> dict[str, Any]:
    return {"linestyle": ("-", "--", ":")[i // 10 % 3], "color": f"C{i % 10}"}


def _finish(figure: Any, axis: Any) -> None:
    """Add a grid, and the legend below the axes, where it covers nothing."""
    axis.grid(alpha=0.3)
    axis.title.set_fontsize(8)
    figure.legend(loc="outside lower center", ncols=2, fontsize=5.5, frameon=False)


# As wide as a telephone, with two pixels of the picture for each of its own: 390.
_WIDTH, _DPI = 4.33, 180


def _figure(height: float, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots(1, columns)
