"""Run methods over a recipe: shared data and labels, one record a method and seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from wmateacher.integrations.engine import processes
from wmateacher.integrations.engine.results import Results, environment, file_name, write_csv
from wmateacher.integrations.engine.sampling import generator
from wmateacher.integrations.mean_teacher.recipes import Recipe
from wmateacher.integrations.mean_teacher.training import fit
from wmateacher.integrations.mean_teacher.views import Plain, Weak, WeakAndStrong
from wmateacher.integrations.vision import backbones, images
from wmateacher.integrations.vision.accuracy import Scores, score

COLUMNS = {
    "test": ("accuracy", 1),
    "student": ("student.accuracy", 1),
    "ECE": ("ece", 3),
    "validation": ("validation", 1),
    "final gap": ("final_gap", 4),
    "seconds": ("seconds", 0),
}
"""Of a table of results: `test` is the teacher's, or the student's where there is none."""
_BATCH = 500


class Experiment:
    """A recipe with its data loaded, and a folder that its results go to.

    The folder holds `results.json`, `gaps/METHOD-SEED.csv`, `curves/METHOD-SEED.csv` and `checkpoints/`. One
    with results of the same configuration is continued: finished runs are not run again, an interrupted
    one goes on from its checkpoint.

    Args:
        recipe: What to run.
        output: The folder.
        root: Where the recipe's data lies.
        download: Let torchvision download it.
        device: To train on.
        workers: Processes that prepare views.
        progress: Show progress bars.

    Raises:
        ValueError: The folder holds results of another configuration, or there are fewer labels than
            classes, or not enough images.
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
            self.data = images.load(recipe.data, root, download=download)
        self.classes = len(self.data.classes)
        choose_labelled(self.data.labels, self.classes, recipe.labels, 0)
        packages = ("timm", "torchvision", "torchmetrics", "scikit-learn")
        self._results = Results(output, asdict(recipe), environment(self.device, packages))
        self._kept: dict[str, list[tuple[Tensor, Tensor]]] = {}

    @property
    def results(self) -> dict[str, Any]:
        """What stands in `results.json`."""
        return self._results.content

    def run(
        self, name: str, seed: int = 0, after_step: Callable[[int], None] | None = None
    ) -> dict[str, Any]:
        """Train by one method, evaluate, and record it.

        Args:
            name: Of the method, in the recipe.
            seed: Of initialisation, of which images are labelled, of order and views.
            after_step: As in `fit`.

        Returns:
            This seed's record; `results["methods"]` has the means over all seeds so far.
        """
        self._results.claim()
        recorded = self._results.recorded(name, seed)
        if recorded is not None:
            return recorded
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
            checkpoint=self.output / "checkpoints" / f"{file_name(name)}-{seed}.pt",
            label=f"{name} (seed {seed})", progress=self.progress, after_step=after_step,
            validate=lambda model: self._score(model, "val").accuracy,
            validate_every=max(1, settings.steps // 10),
        )  # fmt: skip
        curve = fitted.record.series["validation"]
        if processes.is_main():
            write_csv(("step", "accuracy"), curve, self.curve_file(name, seed))
            if "gap" in fitted.record.series:
                write_csv(("step", "gap"), fitted.record.series["gap"], self.gap_file(name, seed))
        of_student = self._score(student, "test")
        teacher = of_student if fitted.teacher is None else self._score(fitted.teacher.module, "test")
        gaps = fitted.record.values("gap")
        record = {
            "seed": seed,
            "accuracy": teacher.accuracy,
            "ece": teacher.ece,
            "student": {"accuracy": of_student.accuracy, "ece": of_student.ece},
            "validation": curve[-1][1],
            "final_gap": gaps[-1] if gaps else None,
            "collapsed": fitted.collapsed,
            "seconds": fitted.record.seconds,
        }
        self._results.record(name, record)
        return record

    def gap_file(self, method: str, seed: int) -> Path:
        """Where the teacher-student gap after every step is written."""
        return self.output / "gaps" / f"{file_name(method)}-{seed}.csv"

    def curve_file(self, method: str, seed: int) -> Path:
        """Where the validation accuracy over training is written."""
        return self.output / "curves" / f"{file_name(method)}-{seed}.csv"

    def _score(self, model: nn.Module, part: str) -> Scores:
        if part not in self._kept:
            data: Dataset[Any] = {"val": self.data.val, "test": self.data.test}[part]
            viewed = images.Viewed(data, Plain(self.recipe.image_size))
            self._kept[part] = list(DataLoader(viewed, batch_size=_BATCH, generator=torch.Generator()))
        return score(model, self._kept[part], self.classes)


def choose_labelled(labels: Tensor, classes: int, count: int, seed: int) -> Tensor:
    """Which images are labelled: the same number of each class, at random; their indices.

    Args:
        labels: Of all images, int64 `[N]`.
        classes: C.
        count: Labelled images, a multiple of C.
        seed: Of the choice.

    Raises:
        ValueError: There are fewer labels than classes, not the same for each, or not as many images.
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
