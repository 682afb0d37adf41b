"""DINO and mean teacher with backbones that are larger than a CPU can train."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gpu import cells
from gpu.record import Options, Record
from wmateacher.integrations.dino import recipes as dino
from wmateacher.integrations.mean_teacher import recipes as mean_teacher

SEEDS = 5
KERNELS = ("beta(0.5,0.5)", "uniform", "ema(0.97)", dino.PAPER_KERNEL)
COLUMNS = {
    "test": ("accuracy", 1),
    "student": ("student.accuracy", 1),
    "k-NN": ("teacher.knn", 1),
    "linear": ("teacher.linear", 1),
    "student k-NN": ("student.knn", 1),
    "final gap": ("final_gap", 4),
    "seconds": ("seconds", 0),
}


def measure(record: Record, options: Options) -> None:
    """Train under several kernels over as many seeds as the time allows."""
    data = "digits" if options.data_root is None or options.quick else "mnist"
    if data == "digits":
        record.skip("mnist", "no --data-root")
    # A run that does not end in time is lost, and DINO's takes the longest.
    steps = None if record.remaining() > 300 else 300
    cells.measure([mean_teachers(data, options.quick), dinos(data, options.quick, steps)], record, options)


def mean_teachers(data: str, quick: bool) -> cells.Study:
    """Return the study of mean teachers with a ResNet-18 on images of 32 pixels."""
    recipe = mean_teacher.RECIPES[data]
    kernels = ("ema(0.99)", "uniform")
    teacher = recipe.method("mean-teacher")
    more = {kernel: replace(teacher, name=kernel, kernel=kernel) for kernel in kernels}
    names = ["mean-teacher"] if quick else [*recipe.methods, *kernels]
    recipe = replace(recipe, methods={**recipe.methods, **more})
    if quick:
        recipe = recipe.with_steps(2)
    else:
        recipe = replace(
            recipe,
            backbone="resnet18(output_stride=8)",
            image_size=32,
            settings=replace(recipe.settings, precision="bf16"),
        )
    return cells.Study(f"mean teacher, {data}", mean_teacher_experiment, recipe, names, 1 if quick else SEEDS)


def dinos(data: str, quick: bool, steps: int | None) -> cells.Study:
    """Return the study of DINO with a ViT-S on images of 32 pixels; the recipe's steps for None."""
    recipe = dino.drawn(data)
    names = KERNELS[:1] if quick else KERNELS
    if quick:
        recipe = replace(recipe.with_steps(2), train_images=200, bank_images=50)
    else:
        recipe = replace(
            recipe.with_steps(steps),
            backbone="vit_small_patch16_224(patch_size=4)",
            image_size=32,
            crops=dino.Crops(32, 16, 4, (0.7, 1.0), (0.4, 0.7)),
            bank_images=4000,
        )
        # A vision transformer needs a lower rate than the small convolutional network of the recipe.
        recipe = replace(recipe, settings=replace(recipe.settings, learning_rate=0.001, precision="bf16"))
    return cells.Study(f"DINO, {data}", dino_experiment, recipe, names, 1 if quick else SEEDS)


def mean_teacher_experiment(recipe: mean_teacher.Recipe, options: Options, folder: str) -> Any:
    """Return the experiment of a recipe."""
    from wmateacher.integrations.mean_teacher.experiment import Experiment

    return _opened(Experiment, recipe, options, folder)


def dino_experiment(recipe: dino.Recipe, options: Options, folder: str) -> Any:
    """Return the experiment of a recipe."""
    from wmateacher.integrations.dino.experiment import Experiment

    return _opened(Experiment, recipe, options, folder)


def _opened(kind: Any, recipe: Any, options: Options, folder: str) -> Any:
    output = options.scratch / "backbones" / folder
    return kind(recipe, output, root=options.data_root, device=options.device, progress=False)


def table(results: dict[str, Any]) -> str:
    """Return a table for each recipe."""
    return cells.table(results, COLUMNS)
