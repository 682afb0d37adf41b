"""Turn the results of a sweep into a table, CSV, pictures and one HTML page."""

from __future__ import annotations

import base64
import csv
import html
import statistics
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from wmateacher import kernels, theory
from wmateacher.integrations.engine.results import write_csv

Row = dict[str, Any]
Figures = dict[str, tuple[str, int]]
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


def write(results: dict[str, Any], output: Path, theory: bool = True) -> None:
    """Write cells.csv, the pictures and report.html beside results.json."""
    found = rows(results)
    header = ["kernel", "distill_weight", "seed", *figures(results), "seconds"]
    write_csv(header, ([cell[key] for key in header] for cell in results["cells"]), output / "cells.csv")
    pictures = {
        "plane.png": plane(found, figures(results)),
        "profiles.png": profiles(found, results["config"]["total_steps"]),
        "gaps.png": gaps(found, output),
    }
    if theory:
        pictures["predicted.png"] = predicted(found, results["config"]["total_steps"])
    for name, drawing in pictures.items():
        drawing.savefig(output / name, dpi=130)
    (output / "report.html").write_text(page(results, found, [output / name for name in pictures]), "utf-8")


def plane(found: list[Row], shown: Figures) -> Any:
    """Draw the first figure against the second, with the Pareto front."""
    figure, axis = _figure(9, 6)
    (x, (x_name, _)), (y, (y_name, _)), *_ = shown.items()
    front = sorted((r for r in found if r["front"]), key=lambda r: r[x])
    axis.plot([r[x] for r in front], [r[y] for r in front], color="0.7", linewidth=1, zorder=0)
    for i, row in enumerate(found):
        many = row["seeds"] > 1
        axis.errorbar(
            row[x], row[y],
            xerr=row[f"{x}_std"] if many else None, yerr=row[f"{y}_std"] if many else None,
            fmt="os^D"[i // 10 % 4], color=f"C{i % 10}", label=_label(row, found), elinewidth=0.6,
            markeredgecolor="black" if row["front"] else "none",
        )  # fmt: skip
    axis.set(
        xlabel=f"{x_name} accuracy (%)",
        ylabel=f"{y_name} accuracy (%)",
        title="Outlined: no other kernel is better in both",
    )
    axis.grid(alpha=0.3)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False)
    return figure


def profiles(found: list[Row], total_steps: int) -> Any:
    """Draw the final weight of every student state, relative to the uniform kernel's."""
    figure, axis = _figure(9, 5)
    names = list(dict.fromkeys(r["kernel"] for r in found if has_profile(r["kernel"])))
    for i, name in enumerate(names):
        weights = kernels.build(name).profile(total_steps) * (total_steps + 1)
        style = ("-", "--", ":")[i // 10 % 3]
        axis.plot(
            [k / total_steps for k in range(total_steps + 1)], weights, style, color=f"C{i % 10}", label=name
        )
    axis.set(xlabel="step / T", ylabel="weight x (T + 1)", yscale="symlog", title="What each kernel averages")
    axis.grid(alpha=0.3)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False)
    return figure


def gaps(found: list[Row], output: Path) -> Any:
    """Draw the distance between each teacher and its student during training, for the first seed."""
    figure, axis = _figure(9, 5)
    for i, row in enumerate(r for r in found if r["gaps"]):
        with (output / row["gaps"]).open(newline="", encoding="utf-8") as stream:
            course = [(int(line["step"]), float(line["gap"])) for line in csv.DictReader(stream)]
        steps, values = zip(*course, strict=True)
        style = ("-", "--", ":")[i // 10 % 3]
        axis.plot(steps, values, style, color=f"C{i % 10}", label=_label(row, found))
    axis.set(xlabel="optimizer step", ylabel="|W - M| / |W|", yscale="log", title="Teacher-student distance")
    axis.grid(alpha=0.3)
    if axis.has_data():
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False)
    return figure


def predicted(found: list[Row], total_steps: int) -> Any:
    """Draw the final gap against the gap that the linear theory predicts from kernel and distill_weight."""
    figure, axis = _figure(7.5, 6)
    compared = [r for r in found if r["final_gap"]]
    points = [
        (theory.predict(r["kernel"], total_steps, r["distill_weight"]).gap, r["final_gap"]) for r in compared
    ]
    for (expected, measured), row in zip(points, compared, strict=True):
        axis.plot(max(expected, 1e-6), measured, "o", color="C0")
        axis.annotate(_label(row, found), (max(expected, 1e-6), measured), xytext=(4, 4),
                      textcoords="offset points", fontsize=7)  # fmt: skip
    title = "Final distance between teacher and student"
    if len(points) > 2:
        title += f": rank correlation {spearmanr(*zip(*points, strict=True)).statistic:.2f}"
    axis.set(
        xlabel="predicted, relative to the start's bias (clipped at 1e-6)",
        ylabel="measured |W - M| / |W|", xscale="log", yscale="log", title=title,
    )  # fmt: skip
    axis.grid(alpha=0.3)
    return figure


def page(results: dict[str, Any], found: list[Row], pictures: list[Path]) -> str:
    """Return one self-contained HTML page."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name, _ in cells(found[0], figures(results)))
    body = "".join(
        f"<tr{' class=front' if row['front'] else ''}>"
        + "".join(f"<td>{html.escape(value)}</td>" for _, value in cells(row, figures(results)))
        + "</tr>"
        for row in found
    )
    images = "".join(
        f'<img alt="{p.stem}" src="data:image/png;base64,{base64.b64encode(p.read_bytes()).decode()}">'
        for p in pictures
    )
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
img {{ max-width: 100%; background: white; margin: 1rem 0; }}
dl {{ display: grid; grid-template-columns: max-content auto; gap: .1rem 1rem; }}
dd {{ margin: 0; }}
</style></head><body>
<h1>Kernel sweep: {html.escape(results["config"]["task"])} on {html.escape(results["config"]["data"])}</h1>
<p>Accuracies in percent, ECE in [0, 1]; bold: no other kernel is better in both {axes}.</p>
<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>
{images}
<h2>Configuration and versions</h2><dl>{listed}</dl>
</body></html>
"""


def _label(row: Row, found: list[Row]) -> str:
    many = len({r["distill_weight"] for r in found}) > 1 and row["kernel"] != "none"
    return f"{row['kernel']} x{row['distill_weight']:g}" if many else row["kernel"]


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()
