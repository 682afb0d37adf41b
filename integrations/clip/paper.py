"""What the paper reports of every method, and how what was measured differs from it."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean, stdev
from typing import Any

from wmateacher.integrations.engine import tables
from wmateacher.integrations.engine.tables import Results

Row = Mapping[str, float]
_FIVE = ("id", "imagenet-v2", "imagenet-r", "imagenet-a", "imagenet-sketch", "objectnet", "ood")
_FOUR = (*_FIVE[:5], "ood4")


def _five(*figures: float, ece: float | None = None) -> Row:
    return dict(zip(_FIVE, figures, strict=True)) | ({} if ece is None else {"ece": ece})


def _four(*figures: float) -> Row:
    return dict(zip(_FOUR, figures, strict=True))


PUBLISHED: Mapping[str, Mapping[str, Row]] = {
    "vit-b-16": {
        "zero-shot": _five(68.33, 61.93, 77.71, 49.95, 48.26, 54.17, 58.39, ece=0.074),
        "ft": _four(82.83, 72.57, 68.53, 39.23, 47.97, 57.08),
        "lp-ft": {**_five(82.44, 72.74, 72.81, 49.28, 50.31, 54.42, 59.91, ece=0.147), "ood4": 59.38},
        "flyp": {**_five(82.72, 72.76, 71.32, 48.49, 49.87, 54.83, 59.45, ece=0.184), "ood4": 60.61},
        "l2-sp": _four(82.87, 72.63, 68.77, 39.73, 48.23, 57.34),
        "car-ft": _four(83.27, 74.03, 75.37, 49.53, 52.97, 62.98),
        "lipsum-ft": {**_five(83.32, 73.57, 75.93, 49.87, 51.43, 54.35, 61.03, ece=0.091), "ood4": 62.70},
        "arf": _four(82.73, 72.77, 75.63, 50.27, 51.83, 62.63),
        "static-sd": _four(82.07, 73.13, 72.87, 42.33, 49.87, 59.55),
        "carot": {**_five(83.15, 74.08, 77.74, 51.57, 52.68, 56.63, 62.54, ece=0.079), "ood4": 64.03},
        "tracer": {**_five(82.76, 74.14, 79.33, 54.92, 53.69, 58.26, 64.07, ece=0.073), "ood4": 65.46},
        "model-stock": _four(84.07, 74.83, 71.77, 51.23, 51.77, 62.40),
    },
    "vit-l-14": {
        "carot": {"id": 86.95, "ood": 74.13, "ece": 0.074},
        "tracer": {"id": 86.27, "ood": 75.32, "ece": 0.073},
    },
    "rn50": {
        "carot": {"id": 76.12, "ood": 42.71, "ece": 0.211},
        "tracer": {"id": 76.48, "ood": 42.73, "ece": 0.181},
    },
}
"""Model -> method -> figures: accuracies in percent, means of three seeds. `ood` is the mean over five
shifts, `ood4` that without ObjectNet; `ece` is the shifts' mean of the ECE computed in each batch."""

_HEADINGS = {
    "id": "IN", "imagenet-v2": "V2", "imagenet-r": "R", "imagenet-a": "A", "imagenet-sketch": "Sketch",
    "objectnet": "ObjNet", "ood": "Avg", "ood4": "Avg of 4", "ece": "ECE",
}  # fmt: skip


def measured(record: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
    """A method's figures under the published names, each with its deviation over several seeds.

    Means over shifts are there where all of these shifts were tested.
    """
    runs = [_named(run) for run in record["runs"]]
    found: dict[str, tuple[float, float | None]] = {}
    for name in runs[0]:
        values = [run[name] for run in runs]
        found[name] = (fmean(values), stdev(values) if len(values) > 1 else None)
    return found


def _named(run: Mapping[str, Any]) -> dict[str, float]:
    shifts = run["ood_per_shift"]
    figures = {"id": run["id"], **shifts}
    if all(name in shifts for name in _FIVE[1:-1]):
        figures |= {"ood": run["ood"], "ece": run["ece_per_batch"]}
    if all(name in shifts for name in _FOUR[1:-1]):
        figures["ood4"] = fmean(shifts[name] for name in _FOUR[1:-1])
    return figures


def compare(results: Results, model: str) -> str:
    """For each method its figures, the paper's, and the difference; deviations over several seeds.

    Args:
        results: As in `results.json`.
        model: A key of `PUBLISHED`.
    """
    rows = []
    for method, record in results["methods"].items():
        theirs, ours = PUBLISHED[model].get(method), measured(record)
        if theirs is None:
            rows.append({"method": method, "": "the paper has no figures"})
            continue
        for what in ("measured", "paper", "difference"):
            row = {"method": method, "": what}
            for name, heading in _HEADINGS.items():
                row[heading] = _cell(what, ours.get(name), theirs.get(name), 3 if name == "ece" else 2)
            rows.append(row)
    shown = {k: "" for row in rows for k in row}
    filled = [{k: row.get(k, "") for k in shown} for row in rows]
    return tables.aligned(filled)


def _cell(what: str, ours: tuple[float, float | None] | None, theirs: float | None, digits: int) -> str:
    if what == "measured" and ours is not None:
        return f"{ours[0]:.{digits}f}" + ("" if ours[1] is None else f" ±{ours[1]:.{digits}f}")
    if what == "paper" and theirs is not None:
        return f"{theirs:.{digits}f}"
    if what == "difference" and ours is not None and theirs is not None:
        return f"{ours[0] - theirs:+.{digits}f}"
    return ""
