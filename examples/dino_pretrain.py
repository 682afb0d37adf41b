"""Pre-train a backbone by DINO under teachers with different kernels, and compare their features.

    python examples/dino_pretrain.py
    python examples/dino_pretrain.py --kernels 'ema(0.97)' uniform --seeds 3
    python examples/dino_pretrain.py mnist --data-root DIR --settings.koleo 0.1
    python examples/dino_pretrain.py imagefolder --data imagefolder:DIR --epochs 20

Several processes share the batches: torchrun --nproc-per-node 2 examples/dino_pretrain.py
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wmateacher import kernels
from wmateacher.integrations.dino import recipes
from wmateacher.integrations.engine import command, console, processes, tables, tracking

if TYPE_CHECKING:
    from wmateacher.integrations.dino.experiment import Experiment


@dataclass(frozen=True, kw_only=True)
class Options(command.RunOptions):
    """Pre-train a backbone by DINO, without labels, under teachers with different kernels.

    Then classify test images by their nearest neighbours among the training images, and by a linear
    classifier. The default run uses bundled digits in random colours: minutes on a CPU, no download.
    """

    kernels: tuple[str, ...] = ()
    """The teachers' kernels, with one run for each, e.g. --kernels 'ema(0.97)' uniform. By default a short
    EMA for drawn images, and the paper's kernel for photographs."""
    steps: int | None = None
    """Number of optimizer steps; warm-up and other schedules change in proportion."""


def main(argv: Sequence[str] | None = None) -> None:
    options, recipe = command.parse(Options, recipes.RECIPES, "digits", argv)
    names = options.kernels or (recipe.kernel,)
    for kernel in names:
        kernels.build(kernel)  # so that a misspelt kernel is found before the first run
    from wmateacher.integrations.dino.experiment import Experiment

    with processes.process_group(options.device) as device:
        output = console.folder(options.output, "dino")
        run = Experiment(
            recipe.with_steps(options.steps), output, root=options.data_root, download=options.download,
            device=device, workers=options.workers,
        )  # fmt: skip
        console.say(f"DINO on {recipe.data}: {recipe.backbone} on {device}, results in {output}")
        with console.resumable(output), tracking.to(options.log_to, output):
            console.conduct(
                run, [*run.baselines, *names], options.seeds,
                lambda r: f"k-NN {r['teacher']['knn']:.1f}, linear {r['teacher']['linear']:.1f}",
            )  # fmt: skip
            conclude(run, names)


def conclude(run: Experiment, names: Sequence[str]) -> None:
    """Print the table and draw the pictures, with attention maps of the first kernel's teacher."""
    from wmateacher.integrations.dino import pictures
    from wmateacher.integrations.dino.experiment import COLUMNS

    backbone = run.fit(names[0]).networks["teacher"].get_submodule("backbone")
    if not processes.is_main():
        return
    print(f"\n{tables.table(run.results, COLUMNS)}\n")
    files = {name: run.file("curves", name, 0) for name in names}
    levels = {name: run.results["methods"][name]["teacher"]["knn"] for name in run.baselines}
    tables.draw_curves(files, levels, run.output / "curves.png")
    try:
        pictures.draw_maps(backbone, run.test_images().to(run.device), run.output / "maps.png")
    except ValueError as error:
        print(f"no maps.png: {error}", file=sys.stderr)
    print(f"wrote {run.output}/results.json, curves/*.csv, curves.png, maps.png")


if __name__ == "__main__":
    command.run(main)
