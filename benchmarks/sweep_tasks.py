"""The tasks of a kernel sweep. Each runs one cell: a kernel with a distillation weight and a seed."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from sweep_report import Figures

from wmateacher.checks import lookup, one_of
from wmateacher.integrations.clip import recipes as clip_recipes
from wmateacher.integrations.clip.experiment import Experiment as ClipExperiment
from wmateacher.integrations.clip.methods import METHODS as CLIP_METHODS
from wmateacher.integrations.clip.methods import with_batch_statistics
from wmateacher.integrations.dino import recipes as dino_recipes
from wmateacher.integrations.dino.experiment import Experiment as DinoExperiment
from wmateacher.integrations.engine.results import file_name
from wmateacher.integrations.language import recipes as language_recipes
from wmateacher.integrations.language.experiment import Experiment as LanguageExperiment
from wmateacher.integrations.mean_teacher import recipes as mean_teacher_recipes
from wmateacher.integrations.mean_teacher.experiment import Experiment as MeanTeacherExperiment
from wmateacher.integrations.vision.digits import SOURCES


@dataclass(frozen=True)
class Cell:
    """One run of the sweep.

    Attributes:
        kernel: The teacher's kernel, or `"none"` for no teacher.
        distill_weight: The weight of the distillation.
        seed: The seed of the run.
        pretraining: The seed of the pre-training, where tasks share one between seeds.
    """

    kernel: str
    distill_weight: float
    seed: int
    pretraining: int = 0

    @property
    def folder(self) -> str:
        """The name of the cell's folder."""
        pretraining = f"-{self.pretraining}" if self.pretraining else ""
        return file_name(f"{self.kernel}-{self.distill_weight}-{self.seed}{pretraining}")


@dataclass(frozen=True)
class Task:
    """A task of the sweep.

    Attributes:
        data: The name of the data.
        root: The folder of the data.
        steps: The number of optimizer steps; None for the recipe's.
        pretrain_steps: The number of steps of pre-training; None for the recipe's.
        output: The folder of the sweep.
        cache: The folder of pretrained networks.
        default_data: The data of a sweep that names none.
        figures: Key in a record -> heading and digits; the first two are the axes of the plane.
        distill_weights: The default weights of the sweep.
        without: Whether the task can run without a teacher.
        several_pretrainings: Whether the seed of the pre-training can be chosen.
        theory: Whether the linear model of `wmateacher.theory` describes this task.
    """

    data: str
    root: Path | None
    steps: int | None
    pretrain_steps: int | None
    output: Path
    cache: Path | None
    default_data: ClassVar[str] = "digits"
    figures: ClassVar[Figures]
    distill_weights: ClassVar[tuple[float, ...]] = (1.0,)
    without: ClassVar[bool] = True
    several_pretrainings: ClassVar[bool] = False
    theory: ClassVar[bool] = False

    @property
    def total_steps(self) -> int:
        """The horizon of the teachers, in optimizer steps."""
        raise NotImplementedError

    @property
    def pretraining(self) -> int | None:
        """Steps of pre-training; None where there is none."""
        return None

    def prepare(self, seeds: int, pretrainings: int = 1) -> str:
        """Compute what all cells of that many seeds and pre-trainings share, and return a line about it."""
        return f"{self.total_steps} steps a cell"

    def run(self, cell: Cell) -> dict[str, Any]:
        """Run one cell and return its record."""
        raise NotImplementedError

    def _folder(self, cell: Cell | None) -> Path:
        return self.output / "cells" / (cell.folder if cell else "pretraining")

    def _finished(self, experiment: Any, record: dict[str, Any], gaps: Path) -> dict[str, Any]:
        shutil.rmtree(experiment.output / "checkpoints", ignore_errors=True)  # a finished cell needs none
        return {**record, "gaps": str(gaps.relative_to(self.output)) if gaps.exists() else None}


class ClipTask(Task):
    """TRACER on colour-shifted digits or pictograms: `examples/clip_tracer.py` with another teacher.

    The distillation weight is the paper's lambda_SD.
    """

    figures: ClassVar[Figures] = {
        "id": ("ID", 1),
        "ood": ("OOD", 1),
        "ece": ("OOD ECE", 3),
        "final_gap": ("final gap", 4),
    }
    distill_weights = (0.9,)
    several_pretrainings = True
    theory = True

    def recipe(self, cell: Cell | None = None, pretraining: int = 0) -> clip_recipes.FromScratchRecipe:
        """Return the recipe for the data, with the cell's method as its only one."""
        one_of("data", self.data, (*SOURCES, clip_recipes.EMOJI.name))
        recipe: clip_recipes.FromScratchRecipe = clip_recipes.EMOJI
        if self.data != clip_recipes.EMOJI.name:
            recipe = replace(clip_recipes.DIGITS, data=self.data).adjust()
        recipe = recipe.with_pretraining(self.pretrain_steps).with_steps(self.steps)
        seed = cell.pretraining if cell else pretraining
        recipe = replace(recipe, pretrain=replace(recipe.pretrain, seed=seed))
        if cell is None:
            return recipe
        teacher: dict[str, Any] = {"kernel": cell.kernel, "distill_weight": cell.distill_weight}
        if cell.kernel == "none":
            teacher = {"kernel": None, "distillation": None, "distill_weight": 1.0}
        methods = {"cell": replace(CLIP_METHODS["tracer"], name="cell", **teacher)}
        if recipe.method("tracer").batch_norm == "batch":
            methods = with_batch_statistics(methods)
        return replace(recipe, methods=methods)

    @property
    def total_steps(self) -> int:
        """The number of fine-tuning steps."""
        return self.recipe().finetune.steps

    @property
    def pretraining(self) -> int | None:
        """The number of pre-training steps."""
        return self.recipe().pretrain.steps

    def prepare(self, seeds: int, pretrainings: int = 1) -> str:
        """Pre-train the towers, once for all seeds."""
        starts = [self._experiment(None, pretraining).pretrain() for pretraining in range(pretrainings)]
        return "\n".join(start.describe() for start in starts if start is not None)

    def run(self, cell: Cell) -> dict[str, Any]:
        """Fine-tune the towers and return the record."""
        experiment = self._experiment(cell)
        experiment.pretrain()
        record = experiment.run("cell", cell.seed)
        return self._finished(experiment, record, experiment.file("gaps", "cell", cell.seed))

    def _experiment(self, cell: Cell | None, pretraining: int = 0) -> ClipExperiment:
        folder = self._folder(cell)
        if cell is None and pretraining:
            folder = folder.with_name(f"{folder.name}-{pretraining}")
        return ClipExperiment(
            self.recipe(cell, pretraining), folder, root=self.root, cache=self.cache, progress=cell is None
        )


class DinoTask(Task):
    """DINO on drawn digits: `examples/dino_pretrain.py`. There is no distill_weight."""

    figures: ClassVar[Figures] = {
        "knn": ("k-NN", 1),
        "linear": ("linear", 1),
        "student_knn": ("student k-NN", 1),
        "final_gap": ("final gap", 4),
    }
    without = False

    @property
    def total_steps(self) -> int:
        """The number of steps of the run."""
        return self._recipe().settings.steps

    def run(self, cell: Cell) -> dict[str, Any]:
        """Pre-train a backbone and return the record."""
        if cell.distill_weight != 1:
            raise ValueError(
                f"--distill-weights: dino has none to change, got {cell.distill_weight:g}: leave it out"
            )
        experiment = DinoExperiment(self._recipe(), self._folder(cell), root=self.root, progress=False)
        record = experiment.run(cell.kernel, cell.seed)
        flat = {"knn": record["teacher"]["knn"], "linear": record["teacher"]["linear"],
                "student_knn": record["student"]["knn"]}  # fmt: skip
        return self._finished(experiment, {**record, **flat}, experiment.file("gaps", cell.kernel, cell.seed))

    def _recipe(self) -> dino_recipes.Recipe:
        if self.data not in dino_recipes.DRAWN:
            raise ValueError(f"--data: dino sweeps {', '.join(dino_recipes.DRAWN)}, got {self.data!r}")
        return dino_recipes.drawn(self.data, self.steps)


class MeanTeacherTask(Task):
    """Few labels: `examples/mean_teacher.py`. The distillation weight multiplies the recipe's own."""

    figures: ClassVar[Figures] = {
        "accuracy": ("test", 1),
        "student_accuracy": ("student", 1),
        "ece": ("ECE", 3),
        "final_gap": ("final gap", 4),
    }

    @property
    def total_steps(self) -> int:
        """The number of steps of the run."""
        return self._recipe().settings.steps

    def run(self, cell: Cell) -> dict[str, Any]:
        """Train from few labels and return the record."""
        recipe = self._recipe()
        method = recipe.method("mean-teacher")
        if cell.kernel == "none":
            method = replace(method, name="cell", kernel=None, distill_weight=0.0)
        else:
            weight = cell.distill_weight * method.distill_weight
            method = replace(method, name="cell", kernel=cell.kernel, distill_weight=weight)
        recipe = replace(recipe, methods={"cell": method})
        experiment = MeanTeacherExperiment(recipe, self._folder(cell), root=self.root, progress=False)
        record = experiment.run("cell", cell.seed)
        record = {**record, "student_accuracy": record["student"]["accuracy"]}
        return self._finished(experiment, record, experiment.file("gaps", "cell", cell.seed))

    def _recipe(self) -> mean_teacher_recipes.Recipe:
        return lookup("data", self.data, mean_teacher_recipes.RECIPES).with_steps(self.steps)


class LanguageTask(Task):
    """A language model learns something new by `sft-teacher`: `examples/self_distillation.py`.

    The distillation weight is that of the teacher's term.
    """

    method: ClassVar[str] = "sft-teacher"
    default_data = "facts"
    figures: ClassVar[Figures] = {
        "new": ("new", 1),
        "kept": ("kept", 1),
        "final_gap": ("final gap", 4),
    }

    @property
    def total_steps(self) -> int:
        """The number of steps of what is new."""
        return self._recipe().settings.steps

    @property
    def pretraining(self) -> int:
        """The number of pre-training steps."""
        return self._recipe().pretrain.steps

    def prepare(self, seeds: int, pretrainings: int = 1) -> str:
        """Pre-train the model of every seed."""
        for seed in range(seeds):
            self._experiment(self._recipe(), None).pretrained(seed)
        return f"pre-trained {seeds} models for {self.pretraining} steps"

    def run(self, cell: Cell) -> dict[str, Any]:
        """Teach the pretrained model something new and return the record."""
        recipe = self._recipe()
        if cell.kernel == "none":
            method = replace(recipe.method("sft"), name="cell")
        else:
            method = replace(
                recipe.method(self.method),
                name="cell",
                kernel=cell.kernel,
                distill_weight=cell.distill_weight,
            )
        experiment = self._experiment(replace(recipe, methods={"cell": method}), cell)
        record = experiment.run("cell", cell.seed)
        record = {**record, "new": record["student"]["new"], "kept": record["student"]["kept"]}
        return self._finished(experiment, record, experiment.file("gaps", "cell", cell.seed))

    def _experiment(self, recipe: language_recipes.Recipe, cell: Cell | None) -> LanguageExperiment:
        pretrained = self._folder(None) / "checkpoints"
        return LanguageExperiment(recipe, self._folder(cell), progress=cell is None, pretrained=pretrained)

    def _recipe(self) -> language_recipes.Recipe:
        recipe = lookup("data", self.data, language_recipes.RECIPES)
        return recipe.with_steps(self.steps, self.pretrain_steps)


class SelfDistillationTask(LanguageTask):
    """The same by `sdft`, which has no distillation weight."""

    method = "sdft"
    without = False

    def run(self, cell: Cell) -> dict[str, Any]:
        """Teach the pretrained model something new and return the record."""
        if cell.distill_weight != 1:
            raise ValueError(
                f"--distill-weights: sdft has none to change, got {cell.distill_weight:g}: leave it out"
            )
        return super().run(cell)


TASKS: dict[str, type[Task]] = {
    "clip": ClipTask,
    "dino": DinoTask,
    "mean-teacher": MeanTeacherTask,
    "lm": LanguageTask,
    "sdft": SelfDistillationTask,
}
