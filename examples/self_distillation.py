"""Teach a small language model something new by self-distillation, and see what it keeps of what it knew.

    python examples/self_distillation.py
    python examples/self_distillation.py --methods sft sdft --kernels static 'tail(0.25)' --seeds 3
    python examples/self_distillation.py skill --lora-rank 8
    python examples/self_distillation.py --trainer trl

It needs Transformers, and PEFT for LoRA: pip install 'wmateacher[examples,huggingface]'; for TRL's trainers,
pip install 'wmateacher[examples,trl]'
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wmateacher.integrations.engine import command, comparison, console, processes, tables, tracking
from wmateacher.integrations.language import recipes
from wmateacher.integrations.language.data import DEMONSTRATION, FACTS


@dataclass(frozen=True, kw_only=True)
class Options(command.BasicOptions):
    """Teach a small language model something new, by methods and teachers, and see what it keeps.

    The default run pre-trains a model on generated facts and skills and teaches it new facts: a few minutes
    on a CPU, no download.
    """

    methods: tuple[str, ...] = tuple(recipes.METHODS)
    """Methods to run: sft, sft-teacher, sdft."""
    kernels: tuple[str, ...] = recipes.KERNELS
    """Kernels of the teachers of sft-teacher and sdft, one run for each."""
    steps: int | None = None
    """Number of optimizer steps of what is new; warm-up changes in proportion."""
    pretrain_steps: int | None = None
    """Number of optimizer steps of pre-training; warm-up changes in proportion."""


def main(argv: Sequence[str] | None = None) -> None:
    options, recipe = command.parse(Options, recipes.RECIPES, "facts", argv)
    recipe = recipe.with_steps(options.steps, options.pretrain_steps)
    recipe = recipe.with_kernels(options.methods, options.kernels)
    from wmateacher.integrations.language.experiment import ACCURACIES, Experiment, columns, pairs
    from wmateacher.integrations.language.pictures import draw

    with processes.process_group(options.device) as device:
        output = console.folder(options.output, "self_distillation")
        run = Experiment(recipe, output, device=device, say=console.say)
        console.say(f"{recipe.summary} on {device}, results in {output}")
        console.say("Test questions answered right (%): on what is new, and on what was known before.")
        with console.resumable(output), tracking.to(options.log_to, output):
            console.conduct(run, [recipes.START, *recipe.methods], options.seeds, _headline)
        print(f"\n{tables.table(run.results, columns(recipe.skills))}\n")
        known = ", ".join((FACTS, *recipe.skills, DEMONSTRATION))
        print(f"kept: the mean of {known}; final gap: |student - teacher| / |student|;")
        print("start: the pretrained model; static: a frozen teacher; ema(0.0): a live one, the student\n")
        compared = pairs(list(recipe.methods))
        if options.seeds > 1 and compared:
            print("Mean of the seeds' differences and 95% t interval:")
            print(f"{comparison.differences(run.results, ACCURACIES, compared)}\n")
        draw(run, list(recipe.methods), output / "courses.png")
        print(f"wrote to {output}: results.json, curves/*.csv, gaps/*.csv, courses.png")


def _headline(record: Mapping[str, Any]) -> str:
    return f"new {record['student']['new']:.1f}, kept {record['student']['kept']:.1f}"


if __name__ == "__main__":
    command.run(main)
