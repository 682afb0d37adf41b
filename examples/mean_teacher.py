"""Few labels, many images: what a mean teacher adds, and what each kernel makes of it.

Trains a small network on digits of which four a class are labelled, by several methods. Nothing is
downloaded.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from wmateacher import kernels
from wmateacher.integrations.engine import console, curves, processes, tables, tracking
from wmateacher.integrations.mean_teacher import experiment, recipes


@dataclass(frozen=True)
class Arguments:
    """Few labels, many images: what a mean teacher adds, and what each kernel makes of it.

    Trains a small network on digits of which four a class are labelled, by several methods.
    """

    methods: tuple[str, ...] = ("supervised", "pi-model", "mean-teacher")
    """Of supervised, pi-model, mean-teacher and fixmatch."""
    kernels: tuple[str, ...] = ()
    """More mean teachers, one of each kernel, e.g. --kernels 'power(sigma_rel=0.2)' uniform."""
    data: str = "digits"
    """digits, mnist, fashion-mnist or cifar10; all but digits need --data-root."""
    data_root: Path | None = None
    """Folder with torchvision's files."""
    download: bool = False
    """Download the data to --data-root where it is not there."""
    labels: int | None = None
    """Labelled images, the same number of each class: 40 of the digits, 100 of MNIST and Fashion-MNIST,
    4000 of CIFAR-10 by default."""
    backbone: str | None = None
    """A timm network, e.g. 'resnet18(output_stride=8)'."""
    steps: int | None = None
    """Optimizer steps."""
    consistency: Literal["mse", "kl", "pseudo"] | None = None
    """What pulls the student to the teacher; each method's own by default."""
    weight: float | None = None
    """Of the consistency; each method's own by default."""
    confidence: float | None = None
    """Only unlabelled images of which the teacher is at least that sure count; 0.95 in FixMatch."""
    buffers: Literal["copy", "average", "keep"] = "copy"
    """BatchNorm's statistics in the teacher: the student's, averaged ones, or the first."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast with float32 weights."""
    workers: int = 0
    """Processes that prepare views."""
    seeds: int = 1
    """Train with this many seeds and report mean and deviation; a seed chooses the labelled images too."""
    output: Path | None = None
    """Results folder; one that was interrupted is continued. Default: runs/mean_teacher-TIME."""
    log_to: tuple[tracking.Tool, ...] = ()
    """tensorboard, wandb, or both: write every loss, its terms, gap and learning rate there."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto takes a GPU where there is one."""


def configured(arguments: Arguments) -> recipes.Recipe:
    """The recipe for the data, with the command line's changes."""
    recipe = recipes.get(arguments.data).with_steps(arguments.steps)
    changes = {
        name: value
        for name in ("consistency", "weight", "confidence")
        if (value := getattr(arguments, name)) is not None
    }
    chosen = {
        name: replace(method, **changes) if method.weight else method
        for name, method in recipe.methods.items()
    }
    for kernel in arguments.kernels:
        kernels.build(kernel)  # a misspelt one should not be found after other runs
        chosen[kernel] = replace(chosen["mean-teacher"], name=kernel, kernel=kernel)
    settings = replace(recipe.settings, buffers=arguments.buffers, precision=arguments.precision)
    return replace(
        recipe, settings=settings, methods=chosen, labels=arguments.labels or recipe.labels,
        backbone=arguments.backbone or recipe.backbone,
    )  # fmt: skip


def main(arguments: Arguments) -> None:
    console.check_seeds(arguments.seeds)
    recipe = configured(arguments)
    names = [recipe.method(name).name for name in (*arguments.methods, *arguments.kernels)]
    with processes.process_group(arguments.device) as device:
        output = console.folder(arguments.output, "mean_teacher")
        run = experiment.Experiment(
            recipe, output, root=arguments.data_root, download=arguments.download,
            device=device, workers=arguments.workers,
        )  # fmt: skip
        console.say(
            f"{recipe.labels} labels of {recipe.data}: {recipe.backbone} on {device}, results in {output}"
        )
        with console.resumable(output), tracking.to(arguments.log_to, output):
            console.conduct(run, names, arguments.seeds, lambda r: f"test accuracy {r['accuracy']:.1f}")
        if processes.is_main():
            print(f"\n{tables.table(run.results, experiment.COLUMNS)}\n")
            curves.picture({name: run.curve_file(name, 0) for name in names}, {}, output / "curves.png")
            print(f"wrote {output}/results.json, curves/*.csv, curves.png")


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments))
    except (ValueError, TypeError, OSError, FloatingPointError, ImportError) as error:
        sys.exit(f"error: {error}")
