"""Run kernels over a recipe: shared data, one record a kernel and seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wmateacher import kernels
from wmateacher.integrations.dino import crops, evaluation
from wmateacher.integrations.dino.recipes import DRAWN, Recipe
from wmateacher.integrations.dino.training import Fit, fit
from wmateacher.integrations.engine import processes
from wmateacher.integrations.engine.results import Results, environment, file_name, write_csv
from wmateacher.integrations.vision import backbones, digits, images

PIXELS, NORMALISED, UNTRAINED = "raw pixels", "normalised pixels", "untrained"
BASELINES = (PIXELS, NORMALISED, UNTRAINED)
"""What nothing is trained for: images as drawn or read, as the network gets them, and its first answers."""
COLUMNS = {
    "k-NN": ("teacher.knn", 1),
    "linear": ("teacher.linear", 1),
    "student k-NN": ("student.knn", 1),
    "student linear": ("student.linear", 1),
    "final gap": ("final_gap", 4),
    "seconds": ("seconds", 0),
}
"""Of a table of results."""


class Experiment:
    """A recipe with its data loaded, and a folder that its results go to.

    The folder holds `results.json`, `gaps/KERNEL-SEED.csv`, `curves/KERNEL-SEED.csv` and `checkpoints/`. One
    with results of the same configuration is continued: finished runs are not run again, an interrupted
    one goes on from its checkpoint.

    Args:
        recipe: What to run.
        output: The folder.
        root: Where the recipe's data lies.
        download: Let torchvision download it.
        device: To train on.
        workers: Processes that prepare photographs.
        progress: Show progress bars.

    Raises:
        ValueError: The folder holds results of another configuration, or the crops do not fit.
        FileNotFoundError: The data is not there.
    """

    def __init__(
        self,
        recipe: Recipe,
        output: Path,
        *,
        root: Path | None = None,
        download: bool = False,
        device: torch.device | str = "cpu",
        workers: int = 0,
        progress: bool = True,
    ):
        self.recipe, self.output, self.progress = recipe, output, progress
        self.device, self.workers = torch.device(device), workers
        with processes.main_process_first():
            if recipe.data in DRAWN:
                source = digits.load(recipe.data, root, download=download)
            else:
                self.photos = images.load(recipe.data, root, download=download)
        size = recipe.crops.global_size
        self.views: evaluation.Views
        if self.drawn:
            self.train = source.train.subset(recipe.train_images)
            self.views = evaluation.DrawnViews(
                source, self.train, recipe.domain, recipe.image_size, size, recipe.bank_images
            )
        else:
            self.views = evaluation.PhotoViews(self.photos, size, workers)
        packages = ("timm", "torchvision", "scikit-learn")
        self._results = Results(output, asdict(recipe), environment(self.device, packages))
        self._stream(0)  # crops that do not fit should not be found after other runs

    @property
    def results(self) -> dict[str, Any]:
        """What stands in `results.json`."""
        return self._results.content

    @property
    def drawn(self) -> bool:
        """Whether grey images are drawn, rather than photographs read."""
        return self.recipe.data in DRAWN

    @property
    def baselines(self) -> tuple[str, ...]:
        """Those that make sense for the data: photographs are large, and not normalised one by one."""
        return BASELINES if self.drawn else (UNTRAINED,)

    def run(
        self, name: str, seed: int = 0, after_step: Callable[[int], None] | None = None
    ) -> dict[str, Any]:
        """Pre-train under a teacher with one kernel, evaluate, and record it.

        Args:
            name: A kernel, or one of `BASELINES`.
            seed: Of initialisation, order and crops.
            after_step: As in `fit`.

        Returns:
            This seed's record; `results["methods"]` has the means over all seeds so far.
        """
        self._results.claim()
        recorded = self._results.recorded(name, seed)
        if recorded is not None:
            return recorded
        if name in BASELINES:
            scores = evaluation.scores(self._baseline(name, seed))
            record: dict[str, Any] = {"teacher": scores, "student": None}
        else:
            record = self._trained(name, seed, after_step)
        record = {"seed": seed, **record}
        self._results.record(name, record)
        return record

    def fit(self, kernel: str, seed: int = 0, after_step: Callable[[int], None] | None = None) -> Fit:
        """The run itself, from its checkpoint where there is one."""
        settings = replace(self.recipe.settings, seed=self.recipe.settings.seed + seed)
        return fit(
            self._backbone(seed), self._stream(seed), settings, kernel,
            checkpoint=self.output / "checkpoints" / f"{file_name(kernel)}-{seed}.pt",
            label=f"{kernel} (seed {seed})", progress=self.progress, after_step=after_step,
            validate=lambda backbone: evaluation.validation(self._features_of(backbone)),
            validate_every=max(1, settings.steps // 10),
        )  # fmt: skip

    def gap_file(self, kernel: str, seed: int) -> Path:
        """Where the teacher-student gap after every step is written."""
        return self.output / "gaps" / f"{file_name(kernel)}-{seed}.csv"

    def curve_file(self, kernel: str, seed: int) -> Path:
        """Where the k-NN accuracy over training is written."""
        return self.output / "curves" / f"{file_name(kernel)}-{seed}.csv"

    def pictured(self, count: int = 6) -> Tensor:
        """Test images as the network sees them, `[count, 3, S, S]`."""
        return next(iter(self.views.batches("test")))[0][:count]

    # --- pieces -------------------------------------------------------------------------------------

    def _trained(self, kernel: str, seed: int, after_step: Callable[[int], None] | None) -> dict[str, Any]:
        kernels.build(kernel)
        fitted = self.fit(kernel, seed, after_step)
        if processes.is_main():
            file = self.curve_file(kernel, seed)
            write_csv(("step", "knn"), fitted.record.series["validation"], file)
            write_csv(("step", "gap"), fitted.record.series["gap"], self.gap_file(kernel, seed))
        return {
            "teacher": evaluation.scores(self._features_of(fitted.average.backbone)),
            "student": evaluation.scores(self._features_of(fitted.student.backbone)),
            "final_gap": fitted.record.values("gap")[-1],
            "validation": fitted.record.values("validation")[-1],
            "collapsed": fitted.collapsed,
            "seconds": fitted.record.seconds,
        }

    def _backbone(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return backbones.build(self.recipe.backbone, self.recipe.crops.global_size).to(self.device)

    def _stream(self, seed: int) -> Any:
        recipe = self.recipe
        seed += recipe.settings.seed
        if self.drawn:
            return crops.DrawnCrops(
                self.train, recipe.domain, recipe.image_size, recipe.crops, recipe.settings.batch_size,
                seed, redraw=recipe.redraw,
            )  # fmt: skip
        return crops.PhotoCrops(self.photos, recipe.crops, recipe.settings.batch_size, seed, self.workers)

    def _features_of(self, backbone: nn.Module) -> evaluation.Features:
        return evaluation.features(self.views, backbone, self.device)

    def _baseline(self, name: str, seed: int) -> evaluation.Features:
        if name == UNTRAINED:
            return self._features_of(self._backbone(seed))
        return evaluation.pixels(self.views, raw=name == PIXELS)
