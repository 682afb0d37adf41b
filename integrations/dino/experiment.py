"""Run DINO with several kernels over a recipe, beside baselines that are not trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wmateacher import kernels
from wmateacher.integrations.dino import crops, evaluation
from wmateacher.integrations.dino.recipes import Recipe
from wmateacher.integrations.dino.training import fit, try_network
from wmateacher.integrations.engine import experiment, processes, training
from wmateacher.integrations.engine.experiment import Outcome, Table
from wmateacher.integrations.vision import backbones, digits, images

__all__ = ["BASELINES", "COLUMNS", "NORMALISED", "PIXELS", "UNTRAINED", "Experiment"]

PIXELS, NORMALISED, UNTRAINED = "raw pixels", "normalised pixels", "untrained"
BASELINES = (PIXELS, NORMALISED, UNTRAINED)
"""Features without training: the pixels of the images, the normalised pixels, and an untrained backbone's."""
COLUMNS = {
    "k-NN": ("teacher.knn", 1),
    "linear": ("teacher.linear", 1),
    "student k-NN": ("student.knn", 1),
    "student linear": ("student.linear", 1),
    "final gap": ("final_gap", 4),
    "seconds": ("seconds", 0),
}
"""The columns of the table of results."""


class Experiment(experiment.Experiment[Recipe]):
    """A recipe with its data loaded, and the folder of its results, with tables `gaps` and `curves`.

    The methods to `run` are kernels, and the `baselines`.

    Args:
        recipe: The recipe to run.
        output: The folder.
        root: The folder of the data.
        download: Whether torchvision may download the data.
        device: The device to train on.
        workers: The number of processes that prepare photographs.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If the folder holds results of another configuration, or the crops do not fit the images.
        FileNotFoundError: If the data is missing.
    """

    packages = ("timm", "torchvision", "scikit-learn")

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
        self.workers, size = workers, recipe.crops.global_size
        self.views: evaluation.Views
        with processes.main_process_first():
            if recipe.drawn:
                source = digits.load(recipe.data, root, download=download)
                self.train_split = source.train.subset(recipe.train_images)
                self.views = evaluation.DrawnViews(
                    source, self.train_split, recipe.domain, recipe.image_size, size, recipe.bank_images
                )
            else:
                self.photos = images.load(recipe.data, root, download=download)
                self.views = evaluation.PhotoViews(self.photos, size, workers)
                recipe = recipe.resolve(len(self.photos.labels))
        super().__init__(recipe, output, device=device, progress=progress)
        # So that crops, a network and settings that do not fit are found before anything is run.
        self._stream(0)
        try_network(self._backbone(0), recipe.settings, recipe.crops)

    @property
    def baselines(self) -> tuple[str, ...]:
        """The baselines for this data: photographs are too large for pixels as features."""
        return BASELINES if self.recipe.drawn else (UNTRAINED,)

    def train(self, name: str, seed: int) -> Outcome:
        """Pre-train under a teacher with the kernel `name`, or evaluate the baseline of that name."""
        if name in BASELINES:
            return Outcome({"teacher": evaluation.scores(self._baseline(name, seed)), "student": None})
        fitted = self.fit(name, seed)
        series = fitted.history.series
        record = {
            **{side: self._scores(fitted.networks[side]) for side in ("teacher", "student")},
            "final_gap": series["gap"][-1][1],
            "validation": series["validation"][-1][1],
            "collapsed": fitted.collapsed,
            "seconds": fitted.history.seconds,
        }
        tables = {
            "curves": Table(("step", "knn"), series["validation"]),
            "gaps": Table(("step", "gap"), series["gap"]),
        }
        return Outcome(record, tables)

    def fit(self, kernel: str, seed: int = 0) -> training.Fit:
        """Pre-train under a teacher with that kernel, from the checkpoint if there is one."""
        kernels.build(kernel)
        settings = replace(self.recipe.settings, seed=self.recipe.settings.seed + seed)
        return fit(
            self._backbone(seed), self._stream(seed), settings, kernel,
            evaluate=lambda networks: {"validation": self._validation(networks["teacher"])},
            evaluate_every=max(1, settings.steps // 10), evaluate_last=True,
            **self.loop_options(kernel, seed),
        )  # fmt: skip

    def test_images(self, count: int = 6) -> Tensor:
        """Return the first test images as the network sees them, shape `[count, 3, S, S]`."""
        return next(iter(self.views.batches("test")))[0][:count]

    def _backbone(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return backbones.build(self.recipe.backbone, self.recipe.crops.global_size).to(self.device)

    def _stream(self, seed: int) -> Any:
        recipe = self.recipe
        seed += recipe.settings.seed
        if recipe.drawn:
            return crops.DrawnCrops(
                self.train_split, recipe.domain, recipe.image_size, recipe.crops, recipe.settings.batch_size,
                seed, redraw=recipe.redraw,
            )  # fmt: skip
        return crops.PhotoCrops(self.photos, recipe.crops, recipe.settings.batch_size, seed, self.workers)

    def _features_of(self, backbone: nn.Module) -> evaluation.Features:
        return evaluation.features(self.views, backbone, self.device)

    def _scores(self, network: nn.Module) -> dict[str, float]:
        return evaluation.scores(self._features_of(network.backbone))  # type: ignore[arg-type]

    def _validation(self, network: nn.Module) -> float:
        return evaluation.validation(self._features_of(network.backbone))  # type: ignore[arg-type]

    def _baseline(self, name: str, seed: int) -> evaluation.Features:
        if name == UNTRAINED:
            return self._features_of(self._backbone(seed))
        return evaluation.pixels(self.views, raw=name == PIXELS)
