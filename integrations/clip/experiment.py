"""Run methods over a recipe: shared data and pretrained towers, one record a method and seed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wmateacher.integrations.clip.datamodules import CLIPData, DigitsData, PhotoData
from wmateacher.integrations.clip.evaluation import Scorer, Scores, summarise
from wmateacher.integrations.clip.methods import METHODS, Merge, Method
from wmateacher.integrations.clip.model import Student, build, head_of, towers_of
from wmateacher.integrations.clip.recipes import DigitsRecipe, PhotoRecipe, Recipe
from wmateacher.integrations.clip.training import build_student, fit
from wmateacher.integrations.engine import loop, processes
from wmateacher.integrations.engine.results import Results, environment, file_name, write_csv
from wmateacher.posthoc import interpolate, model_stock

SIDES = ("student", "teacher")


def default_cache() -> Path:
    """Where pretrained towers are kept: `$XDG_CACHE_HOME/wmateacher`, by default in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "wmateacher"


@dataclass
class Finished:
    """A method's end.

    Attributes:
        student: What it fine-tuned, or made.
        teacher: The averaged student; None where the method has none.
        seconds: Of training.
        series: As `loop.History` has them.
    """

    student: Student
    teacher: Student | None = None
    seconds: float = 0.0
    series: Mapping[str, list[tuple[int, float]]] = field(default_factory=dict)


class Experiment:
    """A recipe with its data loaded, and a folder that its results go to.

    The folder holds `results.json`, `gaps/METHOD-SEED.csv`, `epochs/METHOD-SEED.csv` (the scores of student
    and teacher while training), `reliability/METHOD-SEED.csv` and `checkpoints/`. A folder with results of
    the same configuration is continued: finished methods are not run again, an interrupted one goes on
    from its checkpoint.

    Args:
        recipe: What to run.
        output: The folder.
        root: Where the recipe's data lies.
        download: Let torchvision download digits.
        cache: Where pretrained towers are kept between runs.
        device: To train on.
        workers: Processes that read photographs.
        progress: Show progress bars.
        say: Told of every evaluation while training.
        adapt: Changes the recipe once its number of steps is known, such as for an ablation of intervals.

    Attributes:
        recipe: With the number of steps that its data makes.
        towers: As pretrained, once `pretrain` has run.
        data: The data.

    Raises:
        ValueError: The folder holds results of another configuration; the data is wrong.
        FileNotFoundError: The data is not there.
    """

    def __init__(
        self,
        recipe: Recipe,
        output: Path,
        *,
        root: Path | None = None,
        download: bool = False,
        cache: Path | None = None,
        device: torch.device | str = "cpu",
        workers: int = 0,
        progress: bool = True,
        say: Callable[[str], None] | None = None,
        adapt: Callable[[Recipe], Recipe] | None = None,
    ):
        self.recipe, self.output, self.progress, self.say = recipe, output, progress, say
        self.device = torch.device(device)
        self.cache = cache or default_cache()
        self.data: CLIPData
        torch.manual_seed(recipe.finetune.seed)  # of towers without weights
        if isinstance(recipe, PhotoRecipe):
            with processes.main_process_first():  # the first may download
                self.towers, tokenizer = build(recipe.model, recipe.pretrained)
            photos = PhotoData(recipe, self.towers, tokenizer, root=root, workers=workers)
            self.data, self.recipe = photos, recipe.resolve(len(photos.train))
        elif isinstance(recipe, DigitsRecipe):
            torch.manual_seed(recipe.pretrain.seed)
            self.towers, tokenizer = build(recipe.model)
            self.data = DigitsData(recipe, self.towers, tokenizer, root=root, download=download)
        else:
            raise TypeError(f"recipe must be a DigitsRecipe or a PhotoRecipe, got {type(recipe).__name__}")
        if adapt is not None:
            self.recipe = adapt(self.recipe)
        self.towers.to(self.device)
        self.prompts = self.data.prompts
        packages = ("open_clip_torch", "timm", "torchvision", "torchmetrics", "scikit-learn")
        where = environment(self.device, packages)
        neutral = [f"{settings}.checkpoint_every" for settings in ("finetune", "pretrain")]
        self._results = Results(output, asdict(self.recipe), where, neutral)

    # --- one method ---------------------------------------------------------------------------------

    def pretrain(self) -> float:
        """Pre-train the towers, or load them from the cache; seconds that the training took.

        Towers that came with weights stay as they are.
        """
        if not isinstance(self.recipe, DigitsRecipe) or not isinstance(self.data, DigitsData):
            return 0.0
        settings = self.recipe.pretrain
        key = hashlib.sha256(json.dumps(self._pretraining(), sort_keys=True).encode()).hexdigest()[:16]
        file = self.cache / f"{self.recipe.model}-{self.recipe.data}-{key}.pt"
        pretrained = fit(
            self.towers, METHODS["flyp"], self.data.draw(self.recipe.wide, settings), settings,
            checkpoint=file, label="pre-training", progress=self.progress,
        )  # fmt: skip
        return pretrained.seconds

    def check(self, names: Sequence[str]) -> None:
        """See that methods can run on this data, before any of them takes its time.

        Raises:
            ValueError: One cannot; it says what it needs.
        """
        for name in names:
            reason = self.recipe.why_not(name, labelled=self.data.labelled, anchored=self.data.anchored)
            if reason is not None:
                raise ValueError(reason)
            method = self.recipe.trained(name)
            if method.trains:
                processes.check_batch(self.recipe.finetune.batch_size, equal=method.head == "linear")

    def run(
        self, name: str, seed: int = 0, after_step: Callable[[int], None] | None = None
    ) -> dict[str, Any]:
        """Fine-tune by one method from the pretrained towers, evaluate, and record it.

        Args:
            name: Of the method, in the recipe.
            seed: Of data order, drawing and initialisation; the pretrained towers are the same.
            after_step: As in `fit`.

        Returns:
            This seed's record; `results["methods"]` has the means over all seeds so far.
        """
        self._results.claim()
        recorded = self._results.recorded(name, seed)
        if recorded is not None:
            return recorded
        end = self._finished(self.recipe.method(name), seed, after_step)
        sides = (
            {"student": end.student}
            if end.teacher is None
            else {"student": end.student, "teacher": end.teacher}
        )
        scores = {side: self.evaluate(model) for side, model in sides.items()}
        validation = self.evaluate(end.student, self.data.validation)
        gaps = end.series.get("gap", [])
        in_distribution = next(iter(self.data.tests))
        summaries = {side: summarise(s, in_distribution) for side, s in scores.items()}
        record = {
            "seed": seed,
            **summaries["student"],
            "teacher": summaries.get("teacher"),
            "seconds": end.seconds,
            "final_gap": gaps[-1][1] if gaps else None,
            "validation": {k: s.accuracy for k, s in validation.items()},
            "unreadable": sum(int(count) for _, count in end.series.get("unreadable", [])),
        }
        if processes.is_main():
            self._write(name, seed, end, scores)
        self._results.record(name, record)
        return record

    def evaluate(self, student: Student, tests: Mapping[str, Scorer] | None = None) -> dict[str, Scores]:
        """Score a student's head on sets; on those of the world by default."""
        chosen = self.data.tests if tests is None else tests
        if not chosen:
            return {}
        towers, head = towers_of(student), head_of(student, self.prompts)
        return {name: scorer(towers, head) for name, scorer in chosen.items()}

    @property
    def results(self) -> dict[str, Any]:
        """What stands in `results.json`."""
        return self._results.content

    def gap_file(self, method: str, seed: int) -> Path:
        """Where the teacher-student gap after every step is written."""
        return self.file("gaps", method, seed)

    def file(self, what: str, method: str, seed: int) -> Path:
        """Where one of the tables of a run is written: gaps, epochs, reliability."""
        return self.output / what / f"{file_name(method)}-{seed}.csv"

    # --- pieces -------------------------------------------------------------------------------------

    def _finished(
        self, method: Method, seed: int, after_step: Callable[[int], None] | None = None
    ) -> Finished:
        """A method's finished model."""
        if method.merge is not None:
            return self._merged(method.merge, seed)
        student = build_student(method, deepcopy(self.towers), self.prompts)
        if not method.trains:
            return Finished(student)
        settings = replace(self.recipe.finetune, seed=self.recipe.finetune.seed + 1 + seed)
        label = f"{method.name} (seed {seed})"
        fitted = fit(
            student, method, self.data.pairs(settings), settings,
            prompts=self.prompts, anchors=self.data.anchors(settings) if method.anchors else None,
            checkpoint=self.output / "checkpoints" / f"{file_name(method.name)}-{seed}.pt",
            label=label, progress=self.progress, after_step=after_step,
            evaluate=self._watched, evaluate_every=self.recipe.evaluate_every or 0,
            after_read=None if self.say is None else _telling(self.say, label),
        )  # fmt: skip
        teacher = None if fitted.teacher is None else fitted.teacher.module
        return Finished(student, teacher, fitted.seconds, fitted.series)  # type: ignore[arg-type]

    def _watched(self, models: Mapping[str, nn.Module]) -> dict[str, float]:
        """Figures of student and teacher while training."""
        return _figures({side: self.evaluate(model) for side, model in models.items()})  # type: ignore[arg-type]

    def _merged(self, merge: Merge, seed: int) -> Finished:
        """Weights between the pretrained and fine-tuned ones."""
        method = self.recipe.method(merge.of)
        student = build_student(method, deepcopy(self.towers), self.prompts)
        ends = [self._finished(method, merge.models * seed + i) for i in range(merge.models)]
        states = [end.student.state_dict() for end in ends]
        start = student.state_dict()
        alpha = merge.alpha
        merged = model_stock(start, states) if alpha is None else interpolate(start, states[0], alpha)
        student.load_state_dict(merged)
        return Finished(student, seconds=sum(end.seconds for end in ends))

    def _write(self, name: str, seed: int, end: Finished, scores: Mapping[str, Mapping[str, Scores]]) -> None:
        """The tables of a run."""
        if "gap" in end.series:
            write_csv(("step", "gap"), end.series["gap"], self.file("gaps", name, seed))
        watched = [
            (step, *series.split("/"), value)
            for series, values in end.series.items()
            if series.startswith(tuple(f"{side}/" for side in SIDES))
            for step, value in values
        ]
        if watched:
            last = self.recipe.finetune.steps
            watched += [(last, *series.split("/"), value) for series, value in _figures(scores).items()]
            header = ("step", "model", "set", "figure", "value")
            write_csv(header, watched, self.file("epochs", name, seed))
        rows = [
            (side, test, *row)
            for side, sets in scores.items()
            for test, s in sets.items()
            for row in s.reliability
        ]
        header = ("model", "set", "confidence", "accuracy", "share")
        write_csv(header, rows, self.file("reliability", name, seed))

    def _pretraining(self) -> dict[str, Any]:
        """What the pretrained towers depend on."""
        recipe, data = self.recipe, self.data
        assert isinstance(recipe, DigitsRecipe)
        assert isinstance(data, DigitsData)
        return {
            "model": recipe.model,
            "data": recipe.data,
            "images": len(data.train),
            "domain": asdict(recipe.wide),
            "pretrain": asdict(recipe.pretrain),
            "method": METHODS["flyp"].settings(),
            "checkpoint": loop.FORMAT,
        }


def _figures(scores: Mapping[str, Mapping[str, Scores]]) -> dict[str, float]:
    """Scores by names such as `student/imagenet/accuracy`."""
    return {
        f"{side}/{name}/{figure}": getattr(s, figure)
        for side, sets in scores.items()
        for name, s in sets.items()
        for figure in ("accuracy", "ece")
    }


def _telling(say: Callable[[str], None], label: str) -> Callable[[int, Mapping[str, float]], None]:
    """Says accuracies, where a step logged any."""

    def tell(step: int, values: Mapping[str, float]) -> None:
        for side in SIDES:
            shown = [
                f"{name.split('/')[1]} {value:.1f}"
                for name, value in values.items()
                if name.startswith(f"{side}/") and name.endswith("/accuracy")
            ]
            if shown:
                say(f"{label}, step {step}, {side}: {', '.join(shown)}")

    return tell
