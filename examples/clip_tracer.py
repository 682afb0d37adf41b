"""Robust fine-tuning of CLIP: what each kind of teacher keeps, and what it costs.

By default on digits: pre-trains a small CLIP on many domains (kept for the next run), fine-tunes it on one
narrow domain by several methods, and compares them there (ID) and under shift (OOD). Nothing is downloaded.
With `--recipe imagenet-vit-b-16 --data-root DIR` the paper's experiment. On several processes:
`torchrun --nproc-per-node 2 examples/clip_tracer.py`, gloo on CPUs, nccl on GPUs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from wmateacher.checks import nearest
from wmateacher.integrations.clip import ablations, plan, plots, recipes
from wmateacher.integrations.clip.experiment import Experiment
from wmateacher.integrations.clip.paper import compare
from wmateacher.integrations.clip.recipes import DigitsRecipe, PhotoRecipe
from wmateacher.integrations.engine import console, processes, tracking


@dataclass(frozen=True)
class Arguments:
    """Robust fine-tuning of CLIP: what each kind of teacher keeps, and what it costs.

    By default a small CLIP on digits: pre-trained on many domains (kept for the next run), fine-tuned on
    one, compared there (ID) and under shift (OOD). By --recipe the paper's experiments.
    """

    recipe: str = "digits"
    """digits; colored-mnist, the paper's toy experiment; imagenet-vit-b-16, imagenet-vit-l-14 or
    imagenet-rn50, its main ones, on the data sets in --data-root."""
    set: tuple[str, ...] = ()
    """Any value of the recipe: --set finetune.batch_size=256 methods.tracer.distill_weight=1.5 ...;
    --dry-run names them all."""
    dry_run: bool = False
    """Print configuration, number of steps, an estimate of memory and what data is missing, and stop."""
    compare_paper: bool = False
    """Print every figure beside the paper's, and the difference."""
    methods: tuple[str, ...] = ()
    """E.g. --methods zero-shot flyp tracer, or all. By default the recipe's short list."""
    kernel: str | None = None
    """Kernel of tracer's teacher, e.g. 'beta(0.2,0.7)' or 'ema(0.999)'."""
    distillation: str | None = None
    """Terms of tracer's distillation with their coefficients, e.g. '3.90625*fd + crd'."""
    update_every: int | None = None
    """Optimizer steps between updates of tracer's teacher."""
    published_clock: bool = False
    """Look tracer's kernel up at the number of the update, as the published code does."""
    ablate: str | None = None
    """kernel, lambda, terms, interval, or alpha (WiSE-FT's): the paper's variants of tracer, in its place."""
    alpha_of: str = "ft"
    """The fine-tuned method that --ablate alpha interpolates to."""
    distill_weight: float | None = None
    """lambda_SD, the weight of the distillation, of every method that has a teacher."""
    model: str | None = None
    """Towers: tiny-conv-32, tiny-vit-16, tiny-resnet-32, light-vit-28, or any that open_clip can build."""
    data: str | None = None
    """Of the digits: digits, mnist or fashion-mnist. All but digits need --data-root."""
    data_root: Path | None = None
    """Folder with torchvision's MNIST/raw or FashionMNIST/raw; or with ImageNet and its shifts, which
    `python -m wmateacher.integrations.clip.data.check DIR` looks through."""
    workers: int = 0
    """Processes that read photographs."""
    download: bool = False
    """Download the data to --data-root where it is not there."""
    seeds: int = 1
    """Fine-tune with this many seeds and report mean and deviation."""
    steps: int | None = None
    """Optimizer steps of fine-tuning."""
    pretrain_steps: int | None = None
    """Optimizer steps of pre-training, on digits."""
    output: Path | None = None
    """Results folder; one that was interrupted is continued. Default: runs/clip_tracer-TIME."""
    cache: Path | None = None
    """Where pretrained towers are kept. Default: ~/.cache/wmateacher."""
    log_to: tuple[tracking.Tool, ...] = ()
    """tensorboard, wandb, or both: write every loss, its terms, gap and learning rate there."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto takes a GPU where there is one, under torchrun each process its own."""


def configured(arguments: Arguments) -> recipes.Recipe:
    """The recipe with the command line's changes."""
    recipe = recipes.get(arguments.recipe)
    for name in ("data", "pretrain_steps", "download"):
        if getattr(arguments, name) and not isinstance(recipe, DigitsRecipe):
            raise ValueError(
                f"--{name.replace('_', '-')} is for recipes of digits, got --recipe {recipe.name}"
            )
    if isinstance(recipe, DigitsRecipe):
        recipe = recipe.with_data(arguments.data or recipe.data).with_pretraining(arguments.pretrain_steps)
    recipe = recipe.changed(*arguments.set).with_steps(arguments.steps)
    methods = dict(recipe.methods)
    changes = {
        "kernel": arguments.kernel,
        "distillation": arguments.distillation,
        "update_every": arguments.update_every,
        "clock": "published" if arguments.published_clock else None,
    }
    changed = {name: value for name, value in changes.items() if value is not None}
    if changed:
        methods["tracer"] = replace(methods["tracer"], **changed)  # type: ignore[arg-type]
    if arguments.distill_weight is not None:
        methods = {
            name: m if m.kernel is None else replace(m, distill_weight=arguments.distill_weight)
            for name, m in methods.items()
        }
    return replace(recipe, methods=methods, model=arguments.model or recipe.model)


def chosen(arguments: Arguments, recipe: recipes.Recipe) -> tuple[recipes.Recipe, list[str]]:
    """The recipe with the ablation's variants, if one was asked for, and the names of what to run."""
    if arguments.ablate is None:
        return recipe, recipe.chosen(arguments.methods)
    if arguments.methods:
        raise ValueError(f"--ablate {arguments.ablate} runs its own variants: leave out --methods")
    trained = [name for name, method in recipe.methods.items() if method.trains]
    if arguments.alpha_of not in trained:
        raise ValueError(
            f"--alpha-of: no trained method {arguments.alpha_of!r}; {nearest(arguments.alpha_of, trained)}"
        )
    made = ablations.variants(
        arguments.ablate, recipe.method("tracer"), recipe.finetune.steps, arguments.alpha_of
    )
    return replace(recipe, methods={**recipe.methods, **made}), list(made)


def published(arguments: Arguments, recipe: recipes.Recipe) -> str | None:
    """The rows of the paper's tables to stand beside, if that was asked for."""
    if not arguments.compare_paper:
        return None
    rows = recipe.published if isinstance(recipe, PhotoRecipe) else None
    if rows is None:
        raise ValueError(
            f"--compare-paper: the paper has no table for recipe {recipe.name!r}; its recipes are "
            + ", ".join(name for name, r in recipes.RECIPES.items() if isinstance(r, PhotoRecipe))
        )
    if isinstance(recipe, PhotoRecipe) and recipe.tests[0] != "imagenet":
        raise ValueError(
            "--compare-paper: the first of tests is in-distribution and must be 'imagenet', got "
            f"{recipe.tests}"
        )
    return rows


def main(arguments: Arguments) -> None:
    console.check_seeds(arguments.seeds)
    recipe = configured(arguments)
    chosen(arguments, recipe)
    beside = published(arguments, recipe)
    if arguments.dry_run:
        if os.environ.get("RANK", "0") == "0":
            ranks = int(os.environ.get("WORLD_SIZE", "1"))
            print(plan.describe(recipe, lambda r: chosen(arguments, r), arguments.data_root, ranks))
        return
    with processes.process_group(arguments.device) as device:
        output = console.folder(arguments.output, "clip_tracer")
        run = Experiment(
            recipe, output, root=arguments.data_root, download=arguments.download,
            cache=arguments.cache, device=device, workers=arguments.workers, say=console.say,
            adapt=lambda r: chosen(arguments, r)[0],
        )  # fmt: skip
        recipe, names = chosen(arguments, run.recipe)
        run.check(names)
        console.say(f"{recipe.name}: {recipe.summary}\n{recipe.model} on {device}, results in {output}")
        with console.resumable(output), tracking.to(arguments.log_to, output):
            seconds = run.pretrain()
            if isinstance(recipe, DigitsRecipe):
                console.say(f"pre-trained for {recipe.pretrain.steps} steps, {seconds:.0f} s of training")
            console.conduct(run, names, arguments.seeds, headline)
        if processes.is_main():
            conclude(run, names)
            if beside is not None:
                print(f"\n{compare(run.results, beside)}\n")
            if arguments.ablate is not None:
                conclude_ablation(run, arguments.ablate, names)


def headline(record: Mapping[str, Any]) -> str:
    """A record in a few words."""
    ood = "" if record["ood"] is None else f", mean OOD {record['ood']:.1f}"
    return f"ID {record['id']:.1f}{ood}"


def conclude(run: Experiment, names: list[str]) -> None:
    """The tables and the pictures."""
    print(f"\n{plots.table(run.results)}\n")
    if averaged := plots.teachers(run.results):
        print(f"{averaged}\n")
    if isinstance(run.recipe, DigitsRecipe) and run.recipe.published_forgetting:
        print(f"{plots.forgetting_table(run.results, run.recipe.published_forgetting)}\n")
    files = {
        what: {name: run.file(what, name, 0) for name in names if run.file(what, name, 0).exists()}
        for what in ("gaps", "reliability", "epochs")
    }
    plots.picture(run.results, files["gaps"], run.output / "methods.png")
    plots.reliability(files["reliability"], run.output / "reliability.png")
    written = "results.json, gaps/*.csv, reliability/*.csv, methods.png, reliability.png"
    if files["epochs"]:
        plots.course(files["epochs"], next(iter(run.world.tests)), run.output / "epochs.png")
        written += ", epochs/*.csv, epochs.png"
    print(f"wrote to {run.output}: {written}")


def conclude_ablation(run: Experiment, what: str, names: list[str]) -> None:
    """Its table, beside the paper's where that is of the same model or the digits, and its picture."""
    recipe, file = run.recipe, run.output / "ablation.png"
    variants, photos = {name: recipe.method(name) for name in names}, isinstance(recipe, PhotoRecipe)
    table = ablations.table(
        run.results, what, variants, recipe.finetune.steps,
        beside=not isinstance(recipe, PhotoRecipe) or recipe.published == "vit-b-16",
        ece="ece_per_batch" if photos else "ece",
    )  # fmt: skip
    print(f"\n{table}\n")
    ablations.picture(run.results, what, variants, file)
    print(f"wrote {file}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments))
    except (ValueError, TypeError, OSError, FloatingPointError, ImportError) as error:
        sys.exit(f"error: {error}")
