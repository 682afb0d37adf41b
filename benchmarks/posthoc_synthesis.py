"""Compare averages synthesised after a run with teachers that were kept during it.

    python benchmarks/posthoc_synthesis.py

Run TRACER once on the digits, with a recorder of two power-function averages and, for comparison, a teacher
for each kernel. Afterwards, synthesise each kernel's average from the recorder's snapshots, and evaluate it
beside the teacher that was kept.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from wmateacher import WMATeacher, kernels
from wmateacher.integrations.clip import recipes
from wmateacher.integrations.clip.evaluation import summarise
from wmateacher.integrations.clip.experiment import Experiment
from wmateacher.integrations.clip.methods import METHODS
from wmateacher.integrations.clip.training import fit
from wmateacher.integrations.engine.results import environment, write_json
from wmateacher.posthoc import Recorder, Synthesis, synthesise

KERNELS = ("beta(0.5,0.5)", "uniform", "tail(0.25)", "ema(0.99)", "beta(1.5,1.5)")


def main() -> None:
    """Train once, synthesise, evaluate, print, and write results.json and profiles.png."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS))
    parser.add_argument("--every", type=int, default=8, help="steps between snapshots (default: 8)")
    parser.add_argument("--steps", type=int, help="fine-tuning steps (default: the recipe's)")
    parser.add_argument("--pretrain-steps", type=int, help="pre-training steps (default: the recipe's)")
    parser.add_argument("--output", type=Path, default=Path("runs/posthoc-synthesis"))
    parser.add_argument(
        "--cache", type=Path, help="folder for pretrained towers (default: ~/.cache/wmateacher)"
    )
    arguments = parser.parse_args()
    specs = [str(kernels.build(kernel)) for kernel in arguments.kernels]
    recipe = recipes.DIGITS.with_pretraining(arguments.pretrain_steps).with_steps(arguments.steps)
    experiment = Experiment(recipe, arguments.output / "pretraining", cache=arguments.cache)
    experiment.pretrain()

    snapshots = arguments.output / "snapshots"
    shutil.rmtree(snapshots, ignore_errors=True)  # left by an earlier run
    towers, settings = deepcopy(experiment.towers), replace(recipe.finetune, seed=1)
    recorder = Recorder(towers, settings.steps, folder=snapshots, every=arguments.every)
    kept = {spec: WMATeacher(towers, spec, settings.steps) for spec in specs}

    def after_step(step: int) -> None:
        for average in (recorder, *kept.values()):
            average.update()

    fit(towers, METHODS["tracer"], experiment.data.pairs(settings), settings, after_step=after_step)

    results: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "environment": environment("cpu"),
        "steps": settings.steps,
        "snapshots": len(list(snapshots.iterdir())),
        "kernels": {},
    }
    reports = {}
    for spec, teacher in kept.items():
        state, reports[spec] = synthesise(snapshots, spec)
        synthetic = deepcopy(towers)
        synthetic.load_state_dict(state)
        direct = summarise(experiment.evaluate(teacher.module))
        made = summarise(experiment.evaluate(synthetic.eval()))
        exact = teacher.averaged_state_dict(torch.float64)
        apart = torch.stack([(state[n].double() - exact[n]).norm() for n, _ in towers.named_parameters()])
        travelled = torch.stack(
            [(p.detach().double() - exact[n]).norm() for n, p in experiment.towers.named_parameters()]
        )
        results["kernels"][spec] = {
            "kept": direct,
            "synthesised": made,
            "profile_error": reports[spec].relative_error,
            "l1_error": reports[spec].l1_error,
            "amplification": reports[spec].amplification,
            "weights_apart": float(apart.norm() / travelled.norm()),
        }
        write_json(results, arguments.output / "results.json")
    print(table(results))
    picture(reports, arguments.output / "profiles.png")
    print(f"\nwrote {arguments.output}/results.json, profiles.png")


def table(results: dict[str, Any]) -> str:
    """Return a table with a row per kernel, as printed and as shown in benchmarks/results."""
    head = f"{'':16} {'ID kept':>8} {'made':>6} {'OOD kept':>9} {'made':>6} {'profile error':>14}"
    lines = [f"{head} {'weights apart':>14}"]
    for kernel, row in results["kernels"].items():
        kept, made = row["kept"], row["synthesised"]
        lines.append(
            f"{kernel:16} {kept['id']:8.1f} {made['id']:6.1f} {kept['ood']:9.1f} {made['ood']:6.1f} "
            f"{row['profile_error']:14.1%} {row['weights_apart']:14.1e}"
        )
    return "\n".join(lines)


def picture(reports: dict[str, Synthesis], file: Path) -> None:
    """Draw the weights of each kernel and of its synthesised average."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axis = figure.subplots()
    for i, (kernel, report) in enumerate(reports.items()):
        axis.plot(report.target, color=f"C{i}", label=kernel)
        axis.plot(report.weights, color="black", linewidth=0.7, linestyle="--")
    axis.set(xlabel="optimizer step", ylabel="weight", yscale="symlog", title="Kernels; dashed: synthesised")
    axis.set_yscale("symlog", linthresh=1e-3)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
