"""Robust fine-tuning of a small CLIP: what each kind of teacher keeps, and what it costs.

Pre-trains a small CLIP on digits in many domains (kept for the next run), fine-tunes it on one narrow
domain by several methods, and compares them there (ID) and under shift (OOD). Nothing is downloaded. On
several processes: `torchrun --nproc-per-node 2 examples/clip_tracer.py`, gloo on CPUs, nccl on GPUs.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from wmateacher import kernels
from wmateacher.integrations import logs, processes, study
from wmateacher.integrations.clip import ablations, recipes, report
from wmateacher.integrations.clip.experiment import Experiment
from wmateacher.integrations.clip.methods import Method
from wmateacher.spec import nearest


@dataclass(frozen=True)
class Arguments:
    """Robust fine-tuning of a small CLIP: what each kind of teacher keeps, and what it costs.

    Pre-trains a small CLIP on digits in many domains (kept for the next run), fine-tunes it on one
    narrow domain by several methods, and compares them there (ID) and under shift (OOD).
    """

    recipe: str = "digits"
    """digits, or colored-mnist: the paper's toy experiment, with the published figures beside."""
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
    strength: float | None = None
    """lambda_SD, the weight of the distillation, of every method that has a teacher."""
    model: str | None = None
    """Towers: tiny-conv-32, tiny-vit-16, tiny-resnet-32, light-vit-28, or any that open_clip can build."""
    data: str | None = None
    """digits, mnist or fashion-mnist; the recipe's by default. All but digits need --data-root."""
    data_root: Path | None = None
    """Folder with torchvision's MNIST/raw or FashionMNIST/raw."""
    download: bool = False
    """Download the data to --data-root where it is not there."""
    seeds: int = 1
    """Fine-tune with this many seeds and report mean and deviation."""
    steps: int | None = None
    """Optimizer steps of fine-tuning."""
    pretrain_steps: int | None = None
    """Optimizer steps of pre-training."""
    output: Path | None = None
    """Results folder; one that was interrupted is continued. Default: runs/clip_tracer-TIME."""
    cache: Path | None = None
    """Where pretrained towers are kept. Default: ~/.cache/wmateacher."""
    log: bool = False
    """Write every loss, its terms, gap and learning rate for TensorBoard, to OUTPUT/tensorboard."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto takes a GPU where there is one, under torchrun each process its own."""


def configured(arguments: Arguments) -> recipes.Recipe:
    """The recipe with the command line's changes."""
    recipe = recipes.get(arguments.recipe)
    if arguments.data is not None:
        recipe = recipe.with_data(arguments.data)
    recipe = recipe.with_steps(arguments.pretrain_steps, arguments.steps)
    methods = dict(recipe.methods)
    if arguments.kernel is not None:
        kernels.build(arguments.kernel)  # a misspelt one should not be found after pre-training
    changes = {
        "kernel": arguments.kernel,
        "distillation": arguments.distillation,
        "update_every": arguments.update_every,
        "clock": "published" if arguments.published_clock else None,
    }
    changed = {name: value for name, value in changes.items() if value is not None}
    if changed:
        methods["tracer"] = replace(methods["tracer"], **changed)  # type: ignore[arg-type]
    if arguments.strength is not None:
        methods = {
            name: m if m.kernel is None else replace(m, strength=arguments.strength)
            for name, m in methods.items()
        }
    methods |= varied(arguments, methods, recipe.finetune.steps)
    return replace(recipe, methods=methods, model=arguments.model or recipe.model)


def varied(arguments: Arguments, methods: Mapping[str, Method], steps: int) -> dict[str, Method]:
    """The variants of the ablation, if one was asked for."""
    if arguments.ablate is None:
        return {}
    if arguments.methods:
        raise ValueError(f"--ablate {arguments.ablate} runs its own variants: leave out --methods")
    trained = [name for name, method in methods.items() if method.trains]
    if arguments.alpha_of not in trained:
        raise ValueError(
            f"--alpha-of: no trained method {arguments.alpha_of!r}; {nearest(arguments.alpha_of, trained)}"
        )
    return ablations.variants(arguments.ablate, methods["tracer"], steps, arguments.alpha_of)


def main(arguments: Arguments) -> None:
    study.check_seeds(arguments.seeds)
    recipe = configured(arguments)
    variants = varied(arguments, recipe.methods, recipe.finetune.steps)
    names = list(variants) or recipe.chosen(arguments.methods)
    with processes.joined(arguments.device) as device:
        output = study.folder(arguments.output, "clip_tracer")
        run = Experiment(
            recipe, output, root=arguments.data_root, download=arguments.download,
            cache=arguments.cache, device=device,
        )  # fmt: skip
        study.say(f"{recipe.name}: {recipe.summary}\n{recipe.model} on {device}, results in {output}")
        with study.resumable(output), logs.to_tensorboard(output / "tensorboard" if arguments.log else None):
            study.say(f"pre-trained for {recipe.pretrain.steps} steps, {run.pretrain():.0f} s of training")
            study.conduct(run, names, arguments.seeds, lambda r: f"ID {r['id']:.1f}, mean OOD {r['ood']:.1f}")
        if processes.is_first():
            conclude(run, recipe, names)
            if arguments.ablate is not None:
                steps, file = recipe.finetune.steps, run.output / "ablation.png"
                print(f"\n{ablations.table(run.results, arguments.ablate, variants, steps)}\n")
                ablations.picture(run.results, arguments.ablate, variants, file)
                print(f"wrote {file}")


def conclude(run: Experiment, recipe: recipes.Recipe, names: list[str]) -> None:
    """The table and the picture."""
    print(f"\n{report.table(run.results)}\n")
    if recipe.published_forgetting:
        print(f"{report.forgetting_table(run.results, recipe.published_forgetting)}\n")
    gaps = {name: run.gap_file(name, 0) for name in names if run.gap_file(name, 0).exists()}
    report.picture(run.results, gaps, run.output / "methods.png")
    print(f"wrote {run.output}/results.json, gaps/*.csv, methods.png")


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments))
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
