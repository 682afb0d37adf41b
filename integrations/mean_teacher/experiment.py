"""Run semi-supervised methods over a recipe, with shared data and labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from wmateacher.integrations.engine import experiment, processes
from wmateacher.integrations.engine.experiment import Outcome, Table
from wmateacher.integrations.engine.sampling import generator
from wmateacher.integrations.mean_teacher.recipes import Recipe
from wmateacher.integrations.mean_teacher.training import fit
from wmateacher.integrations.mean_teacher.views import Plain, Weak, WeakAndStrong
from wmateacher.integrations.vision import backbones, images
from wmateacher.integrations.vision.accuracy import Scores, score

__all__ = ["COLUMNS", "Experiment", "choose_labelled"]

COLUMNS = {
    "test": ("accuracy", 1),
    "student": ("student.accuracy", 1),
    "ECE": ("ece", 3),
    "validation": ("validation", 1),
    "final gap": ("final_gap", 4),
    "seconds": ("seconds", 0),
}
"""The columns of the table of results: `test` is the teacher's, or the student's if there is no teacher."""
_BATCH = 500


class Experiment(experiment.Experiment[Recipe]):
    """A recipe with its data loaded, and the folder of its results, with tables `gaps` and `curves`.

    The seed of a run also chooses the labelled images.

    Args:
        recipe: The recipe to run.
        output: The folder.
        root: The folder of the data.
        download: Whether torchvision may download the data.
        device: The device to train on.
        workers: The number of processes that prepare views.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If the folder holds results of another configuration, there are fewer labels than classes,
            or there are not enough images.
        FileNotFoundError: If the data is missing.
    """

    packages = ("timm", "torchvision", "torchmetrics", "scikit-learn")

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
        self.workers = workers
        with processes.main_process_first():
            self.data = images.load(recipe.data, root, download=download)
        self.classes = len(self.data.classes)
        choose_labelled(self.data.labels, self.classes, recipe.labels, 0)
        self._batches: dict[str, list[tuple[Tensor, Tensor]]] = {}
        super().__init__(recipe, output, device=device, progress=progress)

    def train(self, name: str, seed: int) -> Outcome:
        """Train by the method `name` and evaluate."""
        recipe = self.recipe
        settings = replace(recipe.settings, seed=recipe.settings.seed + seed)
        torch.manual_seed(settings.seed)
        student = backbones.build(
            recipe.backbone, recipe.image_size, channels=self.data.channels, classes=self.classes
        ).to(self.device)
        indices = choose_labelled(self.data.labels, self.classes, recipe.labels, settings.seed)
        labelled = images.Views(
            self.data.train, Weak(recipe.image_size, recipe.flip),
            min(settings.labelled_batch, len(indices)), settings.seed,
            indices=indices, workers=self.workers, what="labelled images",
        )  # fmt: skip
        unlabelled = images.Views(
            self.data.train, WeakAndStrong(recipe.image_size, recipe.flip), settings.unlabelled_batch,
            settings.seed + 1_000_000, workers=self.workers, what="unlabelled images",
        )  # fmt: skip
        fitted = fit(
            student, recipe.method(name), labelled, unlabelled, settings, classes=self.classes,
            evaluate=self._validation, evaluate_every=max(1, settings.steps // 10), evaluate_last=True,
            **self.loop_options(name, seed),
        )  # fmt: skip
        series = fitted.history.series
        of_student, *of_teacher = (self._score(network, "test") for network in fitted.networks.values())
        best = of_teacher[0] if of_teacher else of_student
        record = {
            "accuracy": best.accuracy,
            "ece": best.ece,
            "student": {"accuracy": of_student.accuracy, "ece": of_student.ece},
            "validation": series["validation"][-1][1],
            "final_gap": series["gap"][-1][1] if "gap" in series else None,
            "collapsed": fitted.collapsed,
            "seconds": fitted.history.seconds,
        }
        tables = {"curves": Table(("step", "accuracy"), series["validation"])}
        if "gap" in series:
            tables["gaps"] = Table(("step", "gap"), series["gap"])
        return Outcome(record, tables)

    def _validation(self, networks: Mapping[str, nn.Module]) -> dict[str, float]:
        """Return the accuracy of the teacher, or of the student if there is no teacher."""
        network = networks.get("teacher", networks["student"])
        return {"validation": self._score(network, "val").accuracy}

    def _score(self, network: nn.Module, part: str) -> Scores:
        if part not in self._batches:
            data: Dataset[Any] = {"val": self.data.val, "test": self.data.test}[part]
            viewed = images.Viewed(data, Plain(self.recipe.image_size))
            self._batches[part] = list(DataLoader(viewed, batch_size=_BATCH, generator=torch.Generator()))
        return score(network, self._batches[part], self.classes)


def choose_labelled(labels: Tensor, classes: int, count: int, seed: int) -> Tensor:
    """Choose the labelled images at random, the same number of every class, and return their indices.

    Args:
        labels: The labels of all images, int64 `[N]`.
        classes: The number of classes C.
        count: The number of labelled images, a multiple of C.
        seed: The seed of the choice.

    Raises:
        ValueError: If there are fewer labels than classes, the classes cannot have equally many, or a class
            has too few images.
    """
    if count < classes:
        raise ValueError(
            f"labels must be at least one of each of the {classes} classes, got {count}: raise --labels"
        )
    if count % classes:
        raise ValueError(
            f"labels must be a multiple of the {classes} classes, got {count}: take "
            f"{count // classes * classes} or {(count // classes + 1) * classes}"
        )
    chosen = []
    for one in range(classes):
        members = (labels == one).nonzero()[:, 0]
        if len(members) < count // classes:
            raise ValueError(
                f"labels={count} needs {count // classes} images of class {one}, which has {len(members)}"
            )
        order = torch.randperm(len(members), generator=generator(seed, 3, one))
        chosen.append(members[order[: count // classes]])
    return torch.cat(chosen)
