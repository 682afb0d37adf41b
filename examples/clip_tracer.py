"""Fine-tune CLIP by several methods, and compare their accuracy in distribution and under shift.

The default recipe pre-trains a small CLIP on digits of many domains, fine-tunes it on one narrow domain by
several methods, and compares them there (ID) and under shift (OOD), without any downloads. The recipe
`folders` fine-tunes a pretrained CLIP on your own images. The others are the paper's experiments:

    python examples/clip_tracer.py
    python examples/clip_tracer.py emoji --data-root DIR --quick
    python examples/clip_tracer.py --methods flyp tracer --methods.tracer.kernel 'ema(0.99)'
    python examples/clip_tracer.py folders --train DIR/train --tests test DIR/test shifted DIR/shifted
    python examples/clip_tracer.py imagenet-vit-b-16 --data-root DIR --dry-run
    torchrun --nproc-per-node 2 examples/clip_tracer.py

Every run leaves its student as a model folder, `models/METHOD-SEED/student`, and beside it its teacher if it
has one. open_clip loads them, and they classify the images of a folder:

    python -m wmateacher.integrations.clip.predict OUTPUT/models/tracer-0/student IMAGES
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wmateacher.checks import one_of
from wmateacher.collectives import world_size
from wmateacher.integrations.clip import ablations, paper, plots, recipes
from wmateacher.integrations.clip.recipes import (
    DigitsRecipe,
    FileRecipe,
    FolderRecipe,
    FromScratchRecipe,
    PhotoRecipe,
    quick,
)
from wmateacher.integrations.engine import command, console, processes, tracking

if TYPE_CHECKING:
    from wmateacher.integrations.clip.experiment import Experiment


@dataclass(frozen=True, kw_only=True)
class Options(command.RunOptions):
    """Fine-tune CLIP by several methods, and compare their accuracy in distribution and under shift."""

    methods: tuple[str, ...] = ()
    """Methods to run, e.g. --methods zero-shot flyp tracer, or all. If empty, the recipe's short list."""
    ablate: str | None = None
    """Run an ablation: kernel, lambda, terms or interval of tracer, or alpha of WiSE-FT."""
    alpha_of: str = "ft"
    """The fine-tuned method whose weights --ablate alpha interpolates with the pretrained ones."""
    quick: bool = False
    """Few steps on digits or pictograms: whether everything runs, nothing about the methods."""
    steps: int | None = None
    """Optimizer steps of fine-tuning; the warm-up changes in proportion."""
    pretrain_steps: int | None = None
    """Optimizer steps of pre-training on digits or pictograms; the warm-up changes in proportion."""
    pretrainings: int = 1
    """Number of pre-trainings on digits or pictograms; every method and seed runs from each of them."""
    threads: int | None = None
    """The largest number of CPU threads. None is 1 for the tiny and small towers, whose operations are too
    small to share, and torch's own choice for others."""
    dry_run: bool = False
    """Print the configuration, the length, the memory and the missing data of a run, without running it."""
    compare_paper: bool = False
    """Print each result beside the paper's, with the difference."""
    save_models: bool = True
    """Save student and teacher of every run as model folders, each twice for open_clip and transformers."""
    cache: Path | None = None
    """Folder that keeps pre-trained towers, or None for ~/.cache/wmateacher."""


def configure(options: Options, recipe: recipes.Recipe) -> recipes.Recipe:
    """Return the recipe with everything that the command line implies."""
    for name in ("pretrainings", "threads"):
        given = getattr(options, name)
        if given is not None and given < 1:
            raise ValueError(f"--{name} must be at least 1, got {given}")
    pretrains = isinstance(recipe, FromScratchRecipe)
    for flag, given, fits, kind in (
        ("pretrain-steps", options.pretrain_steps is not None, pretrains, "that pre-train"),
        ("pretrainings", options.pretrainings > 1, pretrains, "that pre-train"),
        ("download", options.download, isinstance(recipe, DigitsRecipe), "of digits"),
    ):
        if given and not fits:
            raise ValueError(f"--{flag} is for recipes {kind}, got recipe {recipe.name!r}")
    if options.quick:
        recipe = quick.shorten(recipe)
    recipe = recipe.adjust().with_steps(options.steps)
    return (
        recipe.with_pretraining(options.pretrain_steps) if isinstance(recipe, FromScratchRecipe) else recipe
    )


def select(options: Options, recipe: recipes.Recipe) -> tuple[recipes.Recipe, list[str]]:
    """Return the recipe, with the variants of an ablation if there is one, and the methods to run."""
    if options.ablate is None:
        return recipe, recipe.select(options.methods)
    if options.methods:
        raise ValueError(f"--ablate {options.ablate} runs its own variants: leave out --methods")
    trained = [name for name, method in recipe.methods.items() if method.trains]
    one_of("trained method in --alpha-of", options.alpha_of, trained)
    variants = ablations.variants(
        options.ablate, recipe.method("tracer"), recipe.finetune.steps, options.alpha_of
    )
    return replace(recipe, methods={**recipe.methods, **variants}), list(variants)


def check_comparison(recipe: recipes.Recipe) -> None:
    """Check that the paper has a table for a recipe."""
    if recipe.published not in paper.PUBLISHED:
        known = [name for name, r in recipes.RECIPES.items() if r.published in paper.PUBLISHED]
        raise ValueError(
            f"--compare-paper: the paper has no table for recipe {recipe.name!r}; its recipes are "
            + ", ".join(known)
        )
    if isinstance(recipe, PhotoRecipe) and recipe.tests[0] != "imagenet":
        raise ValueError(
            "--compare-paper: the first of tests is in-distribution and must be 'imagenet', got "
            f"{recipe.tests}"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    options, recipe = command.parse(Options, recipes.RECIPES, "digits", argv)
    recipe = configure(options, recipe)
    select(options, recipe)
    if options.compare_paper:
        check_comparison(recipe)
    if options.dry_run:
        describe(options, recipe)
    else:
        run(options, recipe)


def describe(options: Options, recipe: recipes.Recipe) -> None:
    """Print the plan of a run, once however many processes there are."""
    from wmateacher.integrations.clip import plan

    if os.environ.get("RANK", "0") == "0":
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        print(plan.describe(recipe, lambda r: select(options, r), options.data_root, ranks))


def run(options: Options, recipe: recipes.Recipe) -> None:
    """Run the methods and print their figures."""
    from wmateacher.integrations.clip import export, plan
    from wmateacher.integrations.clip.datamodules import FolderData
    from wmateacher.integrations.clip.experiment import Experiment

    few = 1 if options.threads is None and recipe.model.startswith(("tiny-", "small-")) else options.threads
    with processes.process_group(options.device) as device, processes.at_most_threads(few):
        output = console.folder(options.output, "clip_tracer" + ("-quick" if options.quick else ""))
        experiment = Experiment(
            recipe, output, root=options.data_root, download=options.download, cache=options.cache,
            device=device, workers=options.workers, say=console.say, adapt=lambda r: select(options, r)[0],
            save_models=options.save_models,
        )  # fmt: skip
        recipe, names = select(options, experiment.recipe)
        experiment.check(names)
        console.say(f"{recipe.name}: {recipe.summary}\n{recipe.model} on {device}, results in {output}")
        if (
            isinstance(recipe, FolderRecipe)
            and isinstance(experiment.data, FolderData)
            and processes.is_main()
        ):
            print(plan.outline(recipe, experiment.data.task, names, world_size()), flush=True)
        with console.resumable(output), tracking.to(options.log_to, output):
            starts = [partial(start, experiment, number) for number in range(options.pretrainings)]
            console.conduct(experiment, names, options.seeds, headline, starts)
        if processes.is_main():
            report(experiment, names)
            if options.compare_paper and recipe.published is not None:
                print(f"\n{paper.compare(experiment.results, recipe.published)}\n")
            if options.ablate is not None:
                report_ablation(experiment, options.ablate, names)
            if options.quick and isinstance(recipe, FromScratchRecipe):
                print(f"\n{quick.limits(recipe)}")
            if (saved := experiment.models(names[-1], 0)).exists():
                print(f"\n{export.how_to_use(saved)}")


def start(experiment: Experiment, number: int) -> None:
    """Let the next runs start from a pre-training, which runs once."""
    known = number in experiment.starts
    made = experiment.pretrain(number)
    if made is None or known:
        return
    console.say((f"pre-training {number}: " if number else "") + made.describe())


def headline(record: Mapping[str, Any]) -> str:
    """Return ID and OOD accuracy of a record, as text."""
    ood = "" if record["ood"] is None else f", mean OOD {record['ood']:.1f}"
    held = record["validation"].get("validation")
    return f"ID {record['id']:.1f}{ood}" + ("" if held is None else f", validation {held:.1f}")


def report(experiment: Experiment, names: list[str]) -> None:
    """Print the tables and write the pictures."""
    results, output, published = experiment.results, experiment.output, experiment.recipe.published
    print(f"\n{plots.table(results)}\n")
    if compared := plots.compared(results):
        print(f"{compared}\n")
    if averaged := plots.teachers(results):
        print(f"{averaged}\n")
    if published is not None and published in paper.FORGETTING:
        print(f"{paper.compare_forgetting(results, published)}\n")
    experiment.pretrain()  # the curves are those of the first pre-training
    files = {
        kind: {n: experiment.file(kind, n, 0) for n in names if experiment.file(kind, n, 0).exists()}
        for kind in ("gaps", "reliability", "epochs")
    }
    plots.picture(results, files["gaps"], output / "methods.png")
    plots.reliability(files["reliability"], next(iter(experiment.data.tests)), output / "reliability.png")
    written = "results.json, gaps/*.csv, reliability/*.csv, methods.png, reliability.png"
    if files["epochs"]:
        plots.course(files["epochs"], next(iter(experiment.data.tests)), output / "epochs.png")
        written += ", epochs/*.csv, epochs.png"
    print(f"wrote to {output}: {written}")


def report_ablation(experiment: Experiment, what: str, names: list[str]) -> None:
    """Print the table of an ablation and write its picture."""
    recipe, file = experiment.recipe, experiment.output / "ablation.png"
    variants = {name: recipe.method(name) for name in names}
    pretrained = isinstance(recipe, FileRecipe)
    # The paper's ablations are of ViT-B/16; those of the digits are shown beside them.
    table = ablations.table(
        experiment.results, what, variants, recipe.finetune.steps,
        beside=not pretrained or recipe.published == "vit-b-16",
        ece="ece_per_batch" if isinstance(recipe, PhotoRecipe) else "ece",
    )  # fmt: skip
    print(f"\n{table}\n")
    if compared := ablations.compared(experiment.results, variants, recipe.method("tracer")):
        print(f"{compared}\n")
    ablations.picture(experiment.results, what, variants, file)
    print(f"wrote {file}")


if __name__ == "__main__":
    command.run(main)
