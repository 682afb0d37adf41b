"""Ablations: variants of TRACER that differ in one setting, compared with the paper's figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from wmateacher.checks import lookup
from wmateacher.integrations.clip import clocks, paper, plots
from wmateacher.integrations.clip.methods import Merge, Method
from wmateacher.integrations.engine import tables
from wmateacher.integrations.engine.tables import Results
from wmateacher.posthoc import checkpoint_weights
from wmateacher.spec import parse_sum

__all__ = ["compared", "picture", "start_share", "table", "variants"]


def variants(what: str, tracer: Method, steps: int, of: str = "ft") -> dict[str, Method]:
    """Return the methods of one ablation by name.

    Args:
        what: The ablation. `"kernel"`, `"lambda"` and `"terms"` are the paper's grids. `"interval"` has as
            many updates per run as every 500 and 2,500 steps have in the published run, by this library's
            clock and by the published code's. `"alpha"` is WiSE-FT's coefficient from 0 to 1.
        tracer: The method to vary.
        steps: Optimizer steps of the run.
        of: The name of the fine-tuned method that `"alpha"` interpolates to.

    Raises:
        ValueError: If the ablation is unknown.
    """
    vary = lookup("ablation", what, _VARIED)
    return {name: replace(method, name=name) for name, method in vary(tracer, steps, of).items()}


def _kernels(tracer: Method, steps: int, of: str) -> dict[str, Method]:
    return {kernel: replace(tracer, kernel=kernel) for kernel in paper.ABLATIONS["kernel"]}


def _weights(tracer: Method, steps: int, of: str) -> dict[str, Method]:
    return {
        name: replace(tracer, distill_weight=float(name.removeprefix("lambda=")))
        for name in paper.ABLATIONS["lambda"]
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
            f"the ablation of terms selects from tracer's distillation, and {tracer.distillation!r} has no "
            f"{missing[0]}: leave --methods.tracer.distillation out"
        )
    for name in paper.ABLATIONS["terms"]:
        if name == "all":
            made[name] = tracer
        elif name != "none":
            made[name] = replace(tracer, distillation=" + ".join(own[term] for term in name.split("+")))
    return made


def _intervals(tracer: Method, steps: int, of: str) -> dict[str, Method]:
    made = {"every 1": replace(tracer, update_every=1)}
    for published in ("500", "2500"):
        every = _interval(published, steps)
        made[f"every {every}"] = replace(tracer, update_every=every)
        made[f"every {every}, published clock"] = replace(tracer, update_every=every, clock="published")
    return made


def _interval(published: str, steps: int) -> int:
    """Return the interval that has as many updates in a run as a published one has in the paper's."""
    return max(2, round(steps * int(published) / paper.ABLATION_STEPS)) if published != "1" else 1


def _published(what: str, steps: int) -> Mapping[str, tuple[float, float, float | None]]:
    """Return the paper's figures by the names of the variants. Its intervals are those of its own clock."""
    if what != "interval":
        return paper.ABLATIONS[what]
    return {
        "every 1" if n == "1" else f"every {_interval(n, steps)}, published clock": figures
        for n, figures in paper.ABLATIONS[what].items()
    }


def _alphas(tracer: Method, steps: int, of: str) -> dict[str, Method]:
    summary = f"Between the pretrained weights and {of}'s (WiSE-FT, Wortsman et al. 2022, eq. 1)"
    return {
        f"alpha={tenths / 10:g}": Method("", summary, merge=Merge(of, alpha=tenths / 10), trains=False)
        for tenths in range(11)
    }


_VARIED: dict[str, Callable[[Method, int, str], dict[str, Method]]] = {
    "kernel": _kernels,
    "lambda": _weights,
    "terms": _terms,
    "interval": _intervals,
    "alpha": _alphas,
}


def start_share(method: Method, steps: int) -> float | None:
    """Return the weight of W^0 in the teacher at the end of a run, or None without a teacher."""
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
    """Return a table with one row per variant: its figures, the weight of W^0, and the paper's figures.

    Below the table is the rank correlation between measured and published accuracies on the shifts, if the
    paper reports at least four.

    Args:
        results: The content of `results.json`.
        what: The ablation.
        methods: The variants.
        steps: Optimizer steps of the run.
        beside: Whether to show the paper's figures, which are those of ViT-B/16 on ImageNet.
        ece: The ECE to show: `"ece"`, or `"ece_per_batch"` as the paper computes it.
    """
    from scipy.stats import spearmanr

    published = _published(what, steps) if beside else {}
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
            row |= dict.fromkeys(("paper's ID", "OOD", "ECE"), "")
        if name in published:
            top, ood, theirs_ece = published[name]
            row |= {"paper's ID": f"{top:.2f}", "OOD": f"{ood:.2f}"}
            row["ECE"] = "" if theirs_ece is None else f"{theirs_ece:.3f}"
            if record["ood"] is not None:
                ours.append(record["ood"])
                theirs.append(ood)
        rows.append(row)
    shown = tables.aligned(rows)
    if len(ours) > 3 and len(set(ours)) > 1:
        shown += f"\nrank correlation of mean OOD with the paper's: {spearmanr(ours, theirs).statistic:.2f}"
    return shown


def compared(results: Results, methods: Mapping[str, Method], tracer: Method) -> str:
    """Return the paired differences of all variants to the one that is `tracer` itself; empty if none is."""
    same = [name for name, method in methods.items() if replace(method, name=tracer.name) == tracer]
    return plots.compared(results, same[0]) if same else ""


def picture(results: Results, what: str, methods: Mapping[str, Method], file: Path) -> None:
    """Plot ID and mean OOD accuracy over the variants, and one against the other.

    Args:
        results: The content of `results.json`.
        what: The ablation.
        methods: The variants, in order.
        file: The file to write; its suffix gives the format.
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
    plane.set(xlabel="ID accuracy (%)", ylabel="mean OOD accuracy (%)", title=plots.meaning(results))
    for axes in (course, plane):
        axes.grid(alpha=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
