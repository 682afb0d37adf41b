"""The figures that the paper reports, and tables that compare results with them."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean, stdev
from typing import Any

from wmateacher.integrations.engine import tables
from wmateacher.integrations.engine.tables import Results

__all__ = [
    "ABLATIONS",
    "ABLATION_STEPS",
    "FORGETTING",
    "PUBLISHED",
    "TABLE_2",
    "compare",
    "compare_forgetting",
    "measured",
]

Row = Mapping[str, float]
_FIVE = ("id", "imagenet-v2", "imagenet-r", "imagenet-a", "imagenet-sketch", "objectnet", "ood")
_FOUR = (*_FIVE[:5], "ood4")


def _five(*figures: float, ece: float | None = None) -> Row:
    return dict(zip(_FIVE, figures, strict=True)) | ({} if ece is None else {"ece": ece})


def _four(*figures: float) -> Row:
    return dict(zip(_FOUR, figures, strict=True))


PUBLISHED: Mapping[str, Mapping[str, Row]] = {
    "vit-b-16": {
        "zero-shot": {**_five(68.33, 61.93, 77.71, 49.95, 48.26, 54.17, 58.39, ece=0.074), "ood4": 59.46},
        "ft": _four(82.83, 72.57, 68.53, 39.23, 47.97, 57.08),
        "lp-ft": {**_five(82.44, 72.74, 72.81, 49.28, 50.31, 54.42, 59.91, ece=0.147), "ood4": 61.29},
        "flyp": {**_five(82.72, 72.76, 71.32, 48.49, 49.87, 54.83, 59.45, ece=0.184), "ood4": 60.61},
        "l2-sp": _four(82.87, 72.63, 68.77, 39.73, 48.23, 57.34),
        "car-ft": _four(83.27, 74.03, 75.37, 49.53, 52.97, 62.98),
        "lipsum-ft": {**_five(83.32, 73.57, 75.93, 49.87, 51.43, 54.35, 61.03, ece=0.091), "ood4": 62.70},
        "arf": _four(82.73, 72.77, 75.63, 50.27, 51.83, 62.63),
        "static-sd": _four(82.07, 73.13, 72.87, 42.33, 49.87, 59.55),
        "carot": {**_five(83.15, 74.08, 77.74, 51.57, 52.68, 56.63, 62.54, ece=0.079), "ood4": 64.03},
        "tracer": {**_five(82.76, 74.14, 79.33, 54.92, 53.69, 58.26, 64.07, ece=0.073), "ood4": 65.52},
        "model-stock": _four(84.07, 74.83, 71.77, 51.23, 51.77, 62.40),
    },
    "vit-l-14": {
        "zero-shot": {"id": 75.55, "ood": 70.93},
        "ft": {"id": 84.74, "ood": 64.11},
        # Table 3 gives LP-FT what Table 7 gives FT; these are Table 7's.
        "lp-ft": {"id": 85.26, "ood": 65.98},
        "flyp": {"id": 86.19, "ood": 71.44},
        "carot": {"id": 86.95, "ood": 74.13, "ece": 0.074},
        "tracer": {"id": 86.27, "ood": 75.32, "ece": 0.073},
    },
    "rn50": {
        "zero-shot": {"id": 59.83, "ood": 42.52},
        "ft": {"id": 76.21, "ood": 41.97},
        "lp-ft": {"id": 76.25, "ood": 41.62},
        "flyp": {"id": 76.16, "ood": 42.70},
        "carot": {"id": 76.12, "ood": 42.71, "ece": 0.211},
        "tracer": {"id": 76.48, "ood": 42.73, "ece": 0.181},
    },
}
"""Figures by model and method: accuracies in percent, means of three seeds. `ood` is the mean over five
shifts, `ood4` the mean without ObjectNet, `ece` the mean over shifts of the ECE computed in each batch. The
baselines come from unlike set-ups: Lipsum-FT's row, for one, is that of its own publication."""

TABLE_2: Mapping[str, Mapping[str, Row]] = {
    "vit-b-16": {
        "lp-ft": _four(82.14, 72.09, 70.44, 46.32, 48.65, 59.38),
        "tracer": _four(82.76, 74.12, 79.30, 54.72, 53.69, 65.46),
    }
}
"""Figures of methods to which the paper's Table 2 gives others than its Table 1."""

FORGETTING: Mapping[str, Mapping[str, float]] = {
    "colored-mnist": {"flyp": 37.9, "l2-sp": 13.6, "static-sd": 1.8, "tracer": 0.1},
}
"""Forgetting by toy experiment and method: points of accuracy lost on the first shift."""

ABLATIONS: Mapping[str, Mapping[str, tuple[float, float, float | None]]] = {
    "kernel": {
        "beta(0.2,0.2)": (81.91, 64.22, 0.068),
        "beta(0.5,0.5)": (82.76, 64.07, 0.073),
        "beta(0.7,0.7)": (82.97, 63.77, 0.080),
        "beta(0.9,0.9)": (83.14, 63.38, 0.087),
        "beta(1.0,1.0)": (83.09, 63.22, 0.089),
        "beta(1.5,1.5)": (83.19, 62.79, 0.096),
    },
    "lambda": {
        "lambda=0.1": (83.25, 61.86, 0.136),
        "lambda=0.5": (83.16, 63.70, 0.087),
        "lambda=0.9": (82.76, 64.07, 0.073),
        "lambda=1": (82.70, 64.10, 0.072),
        "lambda=3": (81.58, 63.89, 0.068),
        "lambda=10": (80.52, 63.27, 0.069),
    },
    "terms": {
        "none": (82.69, 59.40, 0.184),
        "icl": (82.50, 59.95, 0.162),
        "cross_kd": (83.19, 61.43, 0.142),
        "crd": (83.17, 63.12, 0.085),
        "fd": (83.06, 63.52, 0.116),
        "fd+crd": (82.45, 64.08, 0.071),
        "all": (82.81, 64.06, 0.074),
    },
    "interval": {
        "1": (82.76, 64.07, 0.073),
        "500": (82.13, 64.12, None),
        "2500": (81.38, 63.98, 0.0677),
    },
    "alpha": {},
}
"""Figures by ablation and variant: accuracy on ImageNet, mean accuracy and mean ECE of the shifts. All are of
ViT-B/16, means of three seeds. The intervals are those of the published clock."""
ABLATION_STEPS = 25_030
"""Optimizer steps of the runs with update intervals of 1, 500 and 2,500 steps."""

_HEADINGS = {
    "id": "IN", "imagenet-v2": "V2", "imagenet-r": "R", "imagenet-a": "A", "imagenet-sketch": "Sketch",
    "objectnet": "ObjNet", "ood": "Avg", "ood4": "Avg of 4", "ece": "ECE",
}  # fmt: skip


def measured(record: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
    """Return a method's figures under the published names, each with its deviation over seeds.

    Means over shifts are included if all of these shifts were tested.
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
    """Return a table of each method's figures, the paper's, and their difference.

    Args:
        results: The content of `results.json`.
        model: A key of `PUBLISHED`.
    """
    rows = []
    for method, record in results["methods"].items():
        theirs, ours = PUBLISHED[model].get(method), measured(record)
        if theirs is None:
            rows.append({"method": method, "": "the paper has no figures"})
            continue
        other = TABLE_2.get(model, {}).get(method)
        for what, row_of in (
            ("measured", theirs),
            ("paper", theirs),
            ("difference", theirs),
            ("Table 2", other),
        ):
            if row_of is None:
                continue
            row = {"method": method, "": what}
            for name, heading in _HEADINGS.items():
                row[heading] = _cell(what, ours.get(name), row_of.get(name), 3 if name == "ece" else 2)
            rows.append(row)
    columns = dict.fromkeys(key for row in rows for key in row)
    return tables.aligned([{key: row.get(key, "") for key in columns} for row in rows])


def compare_forgetting(results: Results, experiment: str) -> str:
    """Return a table of the accuracy lost on the first shift since pre-training, beside the paper's.

    Args:
        results: The content of `results.json`.
        experiment: A key of `FORGETTING`.
    """
    methods, published = results["methods"], FORGETTING[experiment]
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
    return tables.aligned(rows)


def _cell(what: str, ours: tuple[float, float | None] | None, theirs: float | None, digits: int) -> str:
    if what == "measured" and ours is not None:
        return f"{ours[0]:.{digits}f}" + ("" if ours[1] is None else f" ±{ours[1]:.{digits}f}")
    if what in ("paper", "Table 2") and theirs is not None:
        return f"{theirs:.{digits}f}"
    if what == "difference" and ours is not None and theirs is not None:
        return f"{ours[0] - theirs:+.{digits}f}"
    return ""
