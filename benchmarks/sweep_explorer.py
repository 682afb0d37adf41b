"""Write one HTML page that explores the results of kernel sweeps, for a browser without a network.

    python benchmarks/sweep_explorer.py
    python benchmarks/sweep_explorer.py runs/kernel_sweep-clip-digits runs/kernel_sweep-clip-mnist

The page shows every sweep of the folders; without any, those of benchmarks/results. `kernel_sweep.py` leaves
such a page beside its report.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import sweep_report

from wmateacher.integrations.engine.comparison import half_width, is_above_noise
from wmateacher.integrations.engine.results import read_json

RESULTS = Path(__file__).parent / "results"
TEMPLATE = Path(__file__).with_suffix(".html")
COLOURS = {
    "beta": "#ff7f0e",
    "uniform": "#2ca02c",
    "tail": "#17becf",
    "power": "#9467bd",
    "ema": "#d62728",
    "static": "#8c8c8c",
    "gap": "#1f77b4",
    "none": "#8c564b",
}
"""Colour by family of kernels, as in the documentation's pictures; within a family, the shapes differ."""
_OTHER = "#e377c2"


def is_sweep(results: Mapping[str, Any]) -> bool:
    """Return whether the content of a results.json is a sweep's."""
    return bool(results.get("cells")) and "total_steps" in results.get("config", {})


def recorded() -> dict[str, dict[str, Any]]:
    """Return the sweeps of benchmarks/results by folder, those with the most runs first."""
    found = {file.parent.name: read_json(file) for file in sorted(RESULTS.glob("*/results.json"))}
    sweeps = [(folder, results) for folder, results in found.items() if is_sweep(results)]
    return dict(sorted(sweeps, key=lambda sweep: -len(sweep[1]["cells"])))


def page(sweeps: Mapping[str, dict[str, Any]], baseline: str = sweep_report.BASELINE) -> str:
    """Return the page.

    Args:
        sweeps: The content of each sweep's `results.json` by the name of its folder.
        baseline: The kernel that the others are compared with, in pairs of runs.
    """
    data = {
        "baseline": baseline,
        "kernels": _styles(sweeps.values()),
        "sweeps": [_sweep(folder, results, baseline) for folder, results in sweeps.items()],
    }
    # Nothing in the data can end the script or begin a comment.
    text = json.dumps(data, allow_nan=False).replace("&", r"\u0026").replace("<", r"\u003c")
    before, after = TEMPLATE.read_text("utf-8").split("{{data}}")
    return f"{before}{text}{after}"


def _styles(sweeps: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return colour and shape of every kernel, the same in all sweeps."""
    names = dict.fromkeys(cell["kernel"] for results in sweeps for cell in results["cells"])
    shapes: dict[str, int] = {}
    styles = {}
    for name in names:
        colour = COLOURS.get(name.partition("(")[0], _OTHER)
        styles[name] = {"colour": colour, "shape": shapes.setdefault(colour, 0)}
        shapes[colour] += 1
    return styles


def _sweep(folder: str, results: dict[str, Any], baseline: str) -> dict[str, Any]:
    """Return what the page shows of a sweep."""
    config, shown = results["config"], sweep_report.figures(results)
    environment = results.get("environment", {})
    packages = environment.get("packages", {})
    versions = [f"{name} {packages[name]}" for name in ("wmateacher", "torch") if name in packages]
    return {
        "folder": folder,
        "title": f"{config['task']} on {config['data']}",
        "steps": config["total_steps"],
        "made": ", ".join([*versions, *filter(None, [environment.get("processor")])]),
        "figures": [
            {"key": key, "name": name, "digits": digits, "words": sweep_report.EXPLAINED.get(key, name)}
            for key, (name, digits) in shown.items()
        ],
        "points": [_point(row, results, baseline) for row in sweep_report.rows(results)],
    }


def _point(row: sweep_report.Row, results: dict[str, Any], baseline: str) -> dict[str, Any]:
    """Return a kernel at a distillation weight: its runs, their means, and differences to the baseline."""
    keys = list(sweep_report.figures(results))
    cells = [
        cell
        for cell in results["cells"]
        if (cell["kernel"], cell["distill_weight"]) == (row["kernel"], row["distill_weight"])
    ]
    runs = [
        {"pretraining": cell.get("pretraining", 0), "seed": cell["seed"], **{key: cell[key] for key in keys}}
        for cell in cells
    ]
    differences = {}
    for key in keys if row["kernel"] != baseline else []:
        if found := sweep_report.paired(results, row, baseline, key):
            clear = len(found) > 1 and is_above_noise(found)
            differences[key] = {**_interval(list(found.values())), "pairs": len(found), "clear": clear}
    return {
        "kernel": row["kernel"],
        "distill_weight": None if row["kernel"] == "none" else row["distill_weight"],
        "start_weight": row.get("start_weight"),
        "mean_age": row.get("mean_age"),
        "runs": runs,
        "values": {key: _interval([run[key] for run in runs if run[key] is not None]) for key in keys},
        "differences": differences,
    }


def _interval(values: Sequence[float]) -> dict[str, float | None]:
    """Return the mean and half its 95% t interval; None where there are too few values."""
    half = half_width(values)
    return {
        "mean": statistics.fmean(values) if values else None,
        "half": half if math.isfinite(half) else None,
    }


def main() -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path, help="default: every sweep in benchmarks/results")
    parser.add_argument("--output", type=Path, default=Path("explorer.html"), help="default: %(default)s")
    parser.add_argument(
        "--baseline", default=sweep_report.BASELINE, help="kernel of the paired differences (%(default)s)"
    )
    arguments = parser.parse_args()
    sweeps = recorded() if not arguments.folders else {}
    for folder in arguments.folders:
        file = folder / "results.json"
        if not file.exists():
            parser.error(f"{file} does not exist: pass folders that kernel_sweep.py has written")
        sweeps[str(folder)] = read_json(file)
        if not is_sweep(sweeps[str(folder)]):
            parser.error(f"{file} is no kernel sweep: pass folders that kernel_sweep.py has written")
    arguments.output.write_text(page(sweeps, arguments.baseline), "utf-8")
    print(f"wrote {arguments.output} with {len(sweeps)} sweeps: {', '.join(sweeps)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
