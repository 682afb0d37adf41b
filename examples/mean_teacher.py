"""Train a classifier from few labels and many images, by mean teachers with any kernel and other methods.

    python examples/mean_teacher.py
    python examples/mean_teacher.py --methods supervised fixmatch --kernels 'power(sigma_rel=0.2)'
    python examples/mean_teacher.py mnist --data-root DIR --methods.mean-teacher.kernel 'ema(0.99)'

Several processes share the batches: torchrun --nproc-per-node 2 examples/mean_teacher.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from wmateacher.integrations.engine import command, console, processes, tables, tracking
from wmateacher.integrations.mean_teacher import recipes


@dataclass(frozen=True, kw_only=True)
class Options(command.RunOptions):
    """Train a classifier from few labels and many images, by several methods.

    The default run uses bundled digits, four labels per class: a minute or two on a CPU, no download.
    """

    methods: tuple[str, ...] = ("supervised", "pi-model", "mean-teacher")
    """Methods to run: supervised, pi-model, mean-teacher, fixmatch."""
    kernels: tuple[str, ...] = ()
    """Kernels of further mean teachers, one run for each, e.g. --kernels 'power(sigma_rel=0.2)' uniform."""
    steps: int | None = None
    """Number of optimizer steps; warm-up and ramp-up change in proportion."""


def main(argv: Sequence[str] | None = None) -> None:
    options, recipe = command.parse(Options, recipes.RECIPES, "digits", argv)
    teacher = recipe.method("mean-teacher")
    more = {kernel: replace(teacher, name=kernel, kernel=kernel) for kernel in options.kernels}
    recipe = replace(recipe.with_steps(options.steps), methods={**recipe.methods, **more})
    names = [recipe.method(name).name for name in (*options.methods, *options.kernels)]
    from wmateacher.integrations.mean_teacher.experiment import COLUMNS, Experiment

    with processes.process_group(options.device) as device:
        output = console.folder(options.output, "mean_teacher")
        run = Experiment(
            recipe, output, root=options.data_root, download=options.download, device=device,
            workers=options.workers,
        )  # fmt: skip
        console.say(
            f"{recipe.labels} labels of {recipe.data}: {recipe.backbone} on {device}, results in {output}"
        )
        with console.resumable(output), tracking.to(options.log_to, output):
            console.conduct(run, names, options.seeds, lambda r: f"test accuracy {r['accuracy']:.1f}")
        if processes.is_main():
            print(f"\n{tables.table(run.results, COLUMNS)}\n")
            curves = {name: run.file("curves", name, 0) for name in names}
            tables.draw_curves(curves, {}, output / "curves.png")
            print(f"wrote {output}/results.json, curves/*.csv, curves.png")


if __name__ == "__main__":
    command.run(main)
