"""TRACER and other methods on digits and MNIST, with the towers of a CPU's runs and with larger ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu import cells
from gpu.record import Options, Record
from wmateacher.integrations.clip import recipes

SEEDS = 10
COLUMNS = {
    "ID": ("id", 1),
    "mean OOD": ("ood", 1),
    "OOD ECE": ("ece", 3),
    "teacher ID": ("teacher.id", 1),
    "teacher OOD": ("teacher.ood", 1),
    "final gap": ("final_gap", 4),
    "seconds": ("seconds", 0),
}


def measure(record: Record, options: Options) -> None:
    """Run all methods over as many seeds as the time allows."""
    import open_clip

    open_clip.add_model_config(Path(__file__).parent / "configs")
    digits = recipes.get("digits")
    assert isinstance(digits, recipes.DigitsRecipe)
    if options.quick:
        shifts = {"gray": digits.shifts["gray"]}
        digits = replace(digits.with_steps(2).with_pretraining(2), shifts=shifts)
        studies = [study("digits", digits, ("tracer",), 1)]
    else:
        studies = [study(name, recipe, list(digits.methods), SEEDS) for name, recipe in full(digits, options)]
    if options.data_root is None:
        record.skip("mnist", "no --data-root")
    cells.measure(studies, record, options)


def full(digits: recipes.DigitsRecipe, options: Options) -> list[tuple[str, recipes.DigitsRecipe]]:
    """Return the recipes by name, for MNIST only if there is a folder that holds it.

    Learning rates of the larger towers are those of the paper's toy experiment, whose towers are vision
    transformers too.
    """
    toy = recipes.COLORED_MNIST
    found = [("digits", digits)]
    data = [digits]
    if options.data_root is not None:
        mnist = replace(digits, data="mnist").adjust()
        found.append(("mnist", mnist))
        data = [mnist]
    for recipe in data:
        larger = replace(
            recipe,
            model="small-vit-32",
            pretrain=replace(recipe.pretrain, learning_rate=toy.pretrain.learning_rate, precision="bf16"),
            finetune=replace(recipe.finetune, learning_rate=toy.finetune.learning_rate, precision="bf16"),
        )
        found.insert(0, (f"{recipe.data}, ViT-S", larger))
    return found


def study(name: str, recipe: recipes.DigitsRecipe, methods: Any, seeds: int) -> cells.Study:
    """Return a study of a recipe, which pre-trains its towers first."""
    later = [method for method in methods if method not in recipe.default]
    return cells.Study(name, opened, recipe, tuple(methods), seeds, prepare=pretrained, later=later)


def opened(recipe: recipes.DigitsRecipe, options: Options, folder: str) -> Any:
    """Return the experiment of a recipe."""
    import open_clip

    from wmateacher.integrations.clip.experiment import Experiment

    open_clip.add_model_config(Path(__file__).parent / "configs")
    return Experiment(
        recipe, options.scratch / "tracer" / folder, root=options.data_root, cache=options.scratch / "towers",
        device=options.device, progress=False,
    )  # fmt: skip


def pretrained(experiment: Any) -> None:
    """Pre-train the towers of an experiment, or load them."""
    experiment.pretrain()


def table(results: dict[str, Any]) -> str:
    """Return a table for each recipe."""
    return cells.table(results, COLUMNS)
