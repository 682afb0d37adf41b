"""What TRACER's teacher is made of, varied one at a time, beside what the paper reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from scipy.stats import spearmanr

from wmateacher.checks import nearest
from wmateacher.integrations.clip import clocks
from wmateacher.integrations.clip.methods import Merge, Method
from wmateacher.integrations.engine import tables
from wmateacher.integrations.engine.tables import Results
from wmateacher.posthoc import checkpoint_weights
from wmateacher.spec import parse_sum

Published = tuple[float | None, float, float]
"""ImageNet, mean of the shifts, their ECE: ViT-B/16, three seeds."""
PUBLISHED: Mapping[str, Mapping[str, Published]] = {
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
        "none": (None, 59.40, 0.184),
        "icl": (None, 59.95, 0.162),
        "cross_kd": (None, 61.43, 0.142),
        "crd": (None, 63.12, 0.085),
        "fd": (None, 63.52, 0.116),
        "fd+crd": (None, 64.08, 0.071),
        "all": (None, 64.06, 0.074),
    },
    "interval": {},
    "alpha": {},
}
"""What can be varied, and the paper's figures of the variants that it has."""
PUBLISHED_STEPS = 25_030
"""Of the runs with update intervals of 1, 500 and 2,500 steps."""


def variants(what: str, tracer: Method, steps: int, of: str = "ft") -> dict[str, Method]:
    """The methods of one ablation, by name.

    Args:
        what: `"kernel"`, `"lambda"` or `"terms"`: the paper's grids. `"interval"`: updates as often in the
            run as every 500 and 2,500 steps are in the published one, by this library's clock and by the
            published code's. `"alpha"`: WiSE-FT's coefficient from 0 to 1.
        tracer: What is varied.
        steps: Of the run.
        of: The fine-tuned model of `"alpha"`.

    Raises:
        ValueError: There is no such ablation.
    """
    if what not in _VARIED:
        raise ValueError(f"unknown ablation {what!r}; {nearest(what, _VARIED)}")
    return {name: replace(method, name=name) for name, method in _VARIED[what](tracer, steps, of).items()}


def _kernels(tracer: Method, steps: int, of: str) -> dict[str, Method]:
    return {kernel: replace(tracer, kernel=kernel) for kernel in PUBLISHED["kernel"]}


def _strengths(tracer: Method, steps: int, of: str) -> dict[str, Method]:
    return {
        name: replace(tracer, distill_weight=float(name.removeprefix("lambda=")))
        for name in PUBLISHED["lambda"]
    }


def _terms(tracer: Method, steps: int, of: str) -> dict[str, Method]:
    made = {"none": replace(tracer, kernel=None, distillation=None)}
    own = {
        call.name: f"{c!r}*{call}" if c != 1 else str(call)
        for c, call in parse_sum(tracer.distillation or "")
    }
    missing = [name for name in ("fd", "crd", "icl", "cross_kd") if name not in own]
    if missing:
        raise ValueError(
            f"the ablation of terms takes them from tracer's distillation, {tracer.distillation!r} has no "
            f"{missing[0]}: leave --distillation out"
        )
    for name in PUBLISHED["terms"]:
        if name == "all":
            made[name] = tracer
        elif name != "none":
            made[name] = replace(tracer, distillation=" + ".join(own[term] for term in name.split("+")))
    return made


def _intervals(tracer: Method, steps: int, of: str) -> dict[str, Method]:
    made = {"every 1": replace(tracer, update_every=1)}
    for published in (500, 2500):
        every = max(2, round(steps * published / PUBLISHED_STEPS))
        made[f"every {every}"] = replace(tracer, update_every=every)
        made[f"every {every}, published clock"] = replace(tracer, update_every=every, clock="published")
    return made


def _alphas(tracer: Method, steps: int, of: str) -> dict[str, Method]:
    summary = f"Between the pretrained weights and {of}'s (WiSE-FT, Wortsman et al. 2022, eq. 1)"
    return {
        f"alpha={tenths / 10:g}": Method("", summary, merge=Merge(of, alpha=tenths / 10), trains=False)
        for tenths in range(11)
    }


_VARIED: dict[str, Callable[[Method, int, str], dict[str, Method]]] = {
    "kernel": _kernels,
    "lambda": _strengths,
    "terms": _terms,
    "interval": _intervals,
    "alpha": _alphas,
}


def start_share(method: Method, steps: int) -> float | None:
    """The weight of W^0 in the teacher at the end of a run; None without a teacher."""
    if method.kernel is None:
        return None
    kernel, every = clocks.build(method.kernel, method.update_every, method.clock)
    snapshots = [*range(0, steps, every), steps]
    return float(checkpoint_weights(kernel, len(snapshots), snapshots)[0])


def table(
    results: Results,
    what: str,
    methods: Mapping[str, Method],
    steps: int,
    *,
    beside: bool = True,
    ece: str = "ece",
) -> str:
    """One row a variant: what was measured, the weight of W^0, and what the paper reports.

    Under it the rank correlation of the shifts' accuracies with the published ones, where there are any.

    Args:
        results: As in `results.json`.
        what: The ablation.
        methods: Its variants.
        steps: Of the run.
        beside: Show the paper's figures, which are those of ViT-B/16 on ImageNet.
        ece: Which to show: `"ece"`, or `"ece_per_batch"` as the paper computes it.
    """
    published = PUBLISHED[what] if beside else {}
    rows, ours, theirs = [], [], []
    for name, method in methods.items():
        record = results["methods"].get(name)
        if record is None:
            continue
        row = {what: name}
        for heading, (key, digits) in {
            "ID": ("id", 1),
            "mean OOD": ("ood", 1),
            "OOD ECE": (ece, 3),
        }.items():
            row[heading] = tables.figure(record, key, digits)
        if method.merge is None:
            share = start_share(method, steps)
            row["W^0 share"] = "" if share is None else f"{100 * share:.2f}%"
        if published:
            top, ood, theirs_ece = published[name]
            row |= {
                "paper's ID": "" if top is None else f"{top:.2f}",
                "OOD": f"{ood:.2f}",
                "ECE": f"{theirs_ece:.3f}",
            }
            if record["ood"] is not None:
                ours.append(record["ood"])
                theirs.append(ood)
        rows.append(row)
    shown = tables.aligned(rows)
    if len(set(ours)) > 1:
        shown += f"\nrank correlation of mean OOD with the paper's: {spearmanr(ours, theirs).statistic:.2f}"
    return shown


def picture(results: Results, what: str, methods: Mapping[str, Method], file: Path) -> None:
    """ID and mean OOD accuracy over the variants, and one against the other.

    Args:
        results: As in `results.json`.
        what: The ablation.
        methods: Its variants, in order.
        file: Where to write the picture; its suffix gives the format.
    """
    from matplotlib.figure import Figure

    names = [name for name in methods if name in results["methods"]]
    records = [results["methods"][name] for name in names]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    course, plane = figure.subplots(1, 2)
    shifted = all(r["ood"] is not None for r in records)
    for key, label in (("id", "ID"), ("ood", "mean OOD"))[: 2 if shifted else 1]:
        deviations = [r["std"][key] for r in records]
        course.errorbar(
            range(len(names)), [r[key] for r in records], deviations, fmt="o-", capsize=3, label=label
        )
    course.set_xticks(range(len(names)), names, rotation=45, ha="right")
    course.set(ylabel="accuracy (%)", title=f"Over {what}")
    course.legend()
    if shifted:
        plane.plot([r["id"] for r in records], [r["ood"] for r in records], "o-")
    for name, record in zip(names, records, strict=True) if shifted else ():
        plane.annotate(
            name, (record["id"], record["ood"]), fontsize=7, xytext=(4, 4), textcoords="offset points"
        )
    plane.set(xlabel="ID accuracy (%)", ylabel="mean OOD accuracy (%)", title="In and out of distribution")
    for axes in (course, plane):
        axes.grid(alpha=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
