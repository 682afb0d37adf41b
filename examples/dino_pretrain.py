"""DINO with any teacher: features without labels, and what each kernel makes of them.

Pre-trains a small backbone on digits in random colours, angles and noise, and classifies test images by
their nearest neighbours among training images. Nothing is downloaded.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from wmateacher import kernels
from wmateacher.integrations.dino import experiment, pictures, recipes
from wmateacher.integrations.dino.training import PAPER_KERNEL
from wmateacher.integrations.engine import console, curves, processes, tables, tracking
from wmateacher.integrations.vision import images


@dataclass(frozen=True)
class Arguments:
    """DINO with any teacher: features without labels, and what each kernel makes of them.

    Pre-trains a small backbone on digits in random colours, angles and noise, and classifies test images
    by their nearest neighbours among training images.
    """

    kernels: tuple[str, ...] = (PAPER_KERNEL,)
    """Of the teacher, one run each, e.g. --kernels 'ema(0.97)' uniform; the paper's EMA by default."""
    data: str = "digits"
    """digits, mnist or fashion-mnist, drawn in random colours; cifar10; or imagefolder:DIR with DIR/train
    and DIR/val, a folder per class in each. All but digits and imagefolder need --data-root."""
    data_root: Path | None = None
    """Folder with torchvision's files."""
    download: bool = False
    """Download the data to --data-root where it is not there."""
    backbone: str | None = None
    """A timm network, e.g. 'vit_tiny_patch16_224(patch_size=4,depth=4,embed_dim=64,num_heads=4)'."""
    steps: int | None = None
    """Optimizer steps, for drawn data."""
    epochs: int = 100
    """Passes over the images, for photographs."""
    batch_size: int | None = None
    """Images a step, over all processes."""
    centering: Literal["mean", "sinkhorn"] | None = None
    """mean (DINO) or sinkhorn (DINOv2); the recipe's by default."""
    koleo: float = 0.0
    """Weight of KoLeo, which spreads features; 0.1 in DINOv2."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast with float32 weights."""
    workers: int = 0
    """Processes that prepare photographs."""
    seeds: int = 1
    """Train with this many seeds and report mean and deviation."""
    output: Path | None = None
    """Results folder; one that was interrupted is continued. Default: runs/dino-TIME."""
    log_to: tuple[tracking.Tool, ...] = ()
    """tensorboard, wandb, or both: write every loss, its terms, gap and learning rate there."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto takes a GPU where there is one."""


def configured(arguments: Arguments) -> recipes.Recipe:
    """The recipe for the data, with the command line's changes."""
    for kernel in arguments.kernels:
        kernels.build(kernel)  # a misspelt one should not be found after other runs
    if arguments.data in recipes.DRAWN:
        recipe = recipes.drawn(arguments.data, arguments.steps)
    else:
        count = len(images.load(arguments.data, arguments.data_root, download=arguments.download).labels)
        recipe = recipes.photographs(
            arguments.data, count, epochs=arguments.epochs, batch_size=arguments.batch_size
        )
    settings = recipe.settings
    settings = replace(
        settings,
        koleo=arguments.koleo,
        precision=arguments.precision,
        centering=arguments.centering or settings.centering,
        batch_size=arguments.batch_size or settings.batch_size,
    )
    return replace(recipe, settings=settings, backbone=arguments.backbone or recipe.backbone)


def main(arguments: Arguments) -> None:
    console.check_seeds(arguments.seeds)
    with processes.process_group(arguments.device) as device:
        with processes.main_process_first():
            recipe = configured(arguments)
        output = console.folder(arguments.output, "dino")
        run = experiment.Experiment(
            recipe, output, root=arguments.data_root, download=arguments.download,
            device=device, workers=arguments.workers,
        )  # fmt: skip
        console.say(f"DINO on {recipe.data}: {recipe.backbone} on {device}, results in {output}")
        names = [*run.baselines, *arguments.kernels]
        with console.resumable(output), tracking.to(arguments.log_to, output):
            console.conduct(
                run, names, arguments.seeds,
                lambda r: f"k-NN {r['teacher']['knn']:.1f}, linear {r['teacher']['linear']:.1f}",
            )  # fmt: skip
            best = run.fit(arguments.kernels[0])
        if processes.is_main():
            conclude(run, arguments.kernels, best, output)


def conclude(run: experiment.Experiment, names: tuple[str, ...], shown: experiment.Fit, output: Path) -> None:
    """The table and the pictures."""
    print(f"\n{tables.table(run.results, experiment.COLUMNS)}\n")
    files = {name: run.curve_file(name, 0) for name in names}
    levels = {name: run.results["methods"][name]["teacher"]["knn"] for name in run.baselines}
    curves.picture(files, levels, output / "curves.png")
    try:
        pictures.maps(shown.average.backbone, run.pictured().to(run.device), output / "maps.png")
    except ValueError as error:
        print(f"no maps.png: {error}", file=sys.stderr)
    print(f"wrote {output}/results.json, curves/*.csv, curves.png, maps.png")


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments))
    except (ValueError, TypeError, OSError, FloatingPointError, ImportError) as error:
        sys.exit(f"error: {error}")
