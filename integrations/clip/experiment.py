"""Run CLIP fine-tuning methods over a recipe, from shared data and pretrained towers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import timm
import torch
from torch import nn

from wmateacher.collectives import world_size
from wmateacher.integrations.clip import export
from wmateacher.integrations.clip.datamodules import (
    CLIPData,
    DigitsData,
    EmojiData,
    FolderData,
    PhotoData,
    PretrainingData,
)
from wmateacher.integrations.clip.evaluation import Scorer, Scores, summarise
from wmateacher.integrations.clip.methods import METHODS, Merge, Method
from wmateacher.integrations.clip.model import (
    Prompts,
    Student,
    Tokenizer,
    Towers,
    build,
    head_of,
    towers_of,
)
from wmateacher.integrations.clip.recipes import (
    DigitsRecipe,
    EmojiRecipe,
    FileRecipe,
    FolderRecipe,
    FromScratchRecipe,
    PhotoRecipe,
    Recipe,
)
from wmateacher.integrations.clip.training import build_student, fit
from wmateacher.integrations.engine import experiment, loop, processes
from wmateacher.integrations.engine.experiment import Outcome, Table
from wmateacher.integrations.engine.training import Fit
from wmateacher.posthoc import interpolate, model_stock

__all__ = ["Experiment", "Start", "default_cache"]

SIDES = ("student", "teacher")


def default_cache() -> Path:
    """Return the folder of pretrained towers: `$XDG_CACHE_HOME/wmateacher`, by default in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "wmateacher"


# Seeds of pre-training are far apart, so that none is one of fine-tuning's.
_BETWEEN_PRETRAININGS = 1000


class Start(NamedTuple):
    """Pre-trained towers.

    Attributes:
        towers: The towers.
        steps: The optimizer steps of training.
        seconds: The seconds of training, over all interruptions.
        file: The file that keeps them.
        earlier: Whether the file had them already, so that nothing was trained.
    """

    towers: Towers
    steps: int
    seconds: float
    file: Path
    earlier: bool

    def describe(self) -> str:
        """Return in a line whether the towers were trained now."""
        if self.earlier:
            return f"pre-trained earlier ({self.steps} steps, {self.seconds:.0f} s), read from {self.file}"
        return f"pre-trained for {self.steps} steps, {self.seconds:.0f} s of training"


class Experiment(experiment.Experiment[Recipe]):
    """A recipe with its data and towers loaded, and the folder of its results.

    The tables of a run are `gaps`, `reliability`, and `epochs`: the scores of student and teacher during
    training.

    Args:
        recipe: The recipe to run.
        output: The folder.
        root: The folder of the data.
        download: Whether torchvision may download the digits.
        cache: The folder that keeps pretrained towers between runs.
        device: The device to train on.
        workers: The number of processes that read photographs.
        progress: Whether to show progress bars.
        say: Called with a line of text at every evaluation during training.
        adapt: Changes the recipe once its number of steps is known, such as for an ablation of intervals.
        save_models: Whether each run leaves its student and teacher as model folders.

    Attributes:
        recipe: The recipe with the number of steps that its data makes.
        towers: The towers, pretrained once `pretrain` has run.
        starts: The pre-trainings so far, by number.
        data: The data.

    Raises:
        ValueError: If the folder holds results of another configuration, or the data is wrong.
        FileNotFoundError: If the data is missing.
    """

    packages = ("open_clip_torch", "timm", "torchvision", "torchmetrics", "scikit-learn")

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
        save_models: bool = False,
    ):
        self.say, self.cache, self.save_models = say, cache or default_cache(), save_models
        self.data: CLIPData
        if isinstance(recipe, FolderRecipe):
            # Before the towers: what is wrong with the images is said before weights are downloaded.
            task = FolderData.load(recipe, root)
            self.towers, tokenizer = _pretrained(recipe)
            self.data = FolderData(recipe, task, self.towers, tokenizer, root=root, workers=workers)
            recipe = recipe.resolve(len(task.train), self.towers.width, task.digest, world_size())
        elif isinstance(recipe, PhotoRecipe):
            self.towers, tokenizer = _pretrained(recipe)
            photos = PhotoData(recipe, self.towers, tokenizer, root=root, workers=workers)
            self.data, recipe = photos, recipe.resolve(len(photos.train))
        elif isinstance(recipe, DigitsRecipe):
            self.towers, tokenizer = _initial(recipe)
            self.data = DigitsData(recipe, self.towers, tokenizer, root=root, download=download)
        elif isinstance(recipe, EmojiRecipe):
            self.towers, tokenizer = _initial(recipe)
            self.data = EmojiData(recipe, self.towers, tokenizer, root=root)
        else:
            raise TypeError(
                "recipe must be a DigitsRecipe, an EmojiRecipe, a PhotoRecipe or a FolderRecipe, got "
                f"{type(recipe).__name__}"
            )
        if adapt is not None:
            recipe = adapt(recipe)
        super().__init__(recipe, output, device=device, progress=progress)
        self.starts: dict[int, Start] = {}
        self.towers.to(self.device)
        self.prompts = self.data.prompts

    def pretrain(self, number: int = 0) -> Start | None:
        """Pre-train towers, or load them from the cache; the next runs start from them.

        Args:
            number: The number of the pre-training, from 0. Each has its own seed.

        Returns:
            The pre-trained towers, or None if the recipe does not pre-train. Towers that were built with
            pretrained weights are not changed.
        """
        if not isinstance(self.recipe, FromScratchRecipe):
            return None
        if number not in self.starts:
            self.starts[number] = self._start(number)
        self.towers, self.pretraining = self.starts[number].towers, number
        return self.starts[number]

    def cache_file(self, number: int = 0) -> Path:
        """Return the file of a pre-training; its name depends on all that changes the result."""
        recipe = self._numbered(number)
        key = hashlib.sha256(json.dumps(self._depends(recipe), sort_keys=True).encode()).hexdigest()[:16]
        return self.cache / f"{recipe.model}-{recipe.name}-{key}.pt"

    def _numbered(self, number: int) -> FromScratchRecipe:
        """Return the recipe with the seed of a pre-training."""
        recipe = self.recipe
        assert isinstance(recipe, FromScratchRecipe)
        seed = recipe.pretrain.seed + _BETWEEN_PRETRAININGS * number
        return replace(recipe, pretrain=replace(recipe.pretrain, seed=seed))

    def _start(self, number: int) -> Start:
        recipe, file = self._numbered(number), self.cache_file(number)
        towers = _initial(recipe)[0].to(self.device)
        taken: list[int] = []
        pretrained = fit(
            towers, METHODS["flyp"], self._pretraining_data.anchors(recipe.pretrain), recipe.pretrain,
            checkpoint=file, label=f"pre-training {number}" if number else "pre-training",
            progress=self.progress, after_step=taken.append,
        )  # fmt: skip
        return Start(towers, recipe.pretrain.steps, pretrained.history.seconds, file, earlier=not taken)

    @property
    def _pretraining_data(self) -> PretrainingData:
        return self.data  # type: ignore[return-value]

    def check(self, names: Sequence[str]) -> None:
        """Check that methods can run on this data, before the first of them starts.

        Raises:
            ValueError: If a method cannot run; the message says what it needs.
        """
        for name in names:
            reason = self.recipe.why_not(name, labelled=self.data.labelled, anchored=self.data.anchored)
            if reason is not None:
                raise ValueError(reason)
            method = self.recipe.trained(name)
            if method.trains:
                processes.check_batch(self.recipe.finetune.batch_size, equal=method.head == "linear")

    def run(self, name: str, seed: int = 0) -> dict[str, Any]:
        """Train, evaluate, save and record one method, unless it is recorded already; save missing models."""
        record = super().run(name, seed)
        if self._lacks_models(name, seed):
            needed = self._checkpoints(name, seed)
            lost = processes.broadcast_from_main([str(file) for file in needed if not file.exists()])
            if not lost:
                self._save(name, seed, self._finished(self.recipe.method(name), seed))
            elif self.say is not None:
                self.say(f"{name} (seed {seed}): models cannot be saved, {', '.join(lost)} is missing")
        return record

    def models(self, name: str, seed: int) -> Path:
        """Return the folder of the models of a run, one for the student and one for its teacher."""
        return self.output / "models" / self.run_name(name, seed)

    def train(self, name: str, seed: int) -> Outcome:
        """Fine-tune by the method `name` from the pretrained towers, save the models, and evaluate."""
        end = self._finished(self.recipe.method(name), seed)
        if self._lacks_models(name, seed):
            self._save(name, seed, end)
        series = end.history.series
        prompts = self._data_of(self.recipe.trained(name)).prompts
        scores = self._scores(end.networks, prompts)
        validation = self.evaluate(end.student, self.data.validation, prompts)  # type: ignore[arg-type]
        in_distribution = next(iter(self.data.tests))
        summaries = {side: summarise(s, in_distribution) for side, s in scores.items()}
        record = {
            **summaries["student"],
            "teacher": summaries.get("teacher"),
            "seconds": end.history.seconds,
            "final_gap": series["gap"][-1][1] if "gap" in series else None,
            "validation": {k: s.accuracy for k, s in validation.items()},
            "unreadable": sum(map(int, end.history.values("unreadable"))),
        }
        return Outcome(record, self._tables(series, scores))

    def evaluate(
        self, student: Student, tests: Mapping[str, Scorer] | None = None, prompts: Prompts | None = None
    ) -> dict[str, Scores]:
        """Score a model on sets, by default on the test sets of the data, with its prompts."""
        chosen = self.data.tests if tests is None else tests
        if not chosen:
            return {}
        towers, head = towers_of(student), head_of(student, prompts or self.prompts)
        return {name: scorer(towers, head) for name, scorer in chosen.items()}

    def _finished(self, method: Method, seed: int) -> Fit:
        """Return the networks at the end of a method."""
        if method.merge is not None:
            return self._merged(method.merge, seed)
        data = self._data_of(method)
        student = build_student(method, deepcopy(self.towers), data.prompts)
        if not method.trains:
            return Fit(student)
        settings = replace(self.recipe.finetune, seed=self.recipe.finetune.seed + 1 + seed)
        options = self.loop_options(method.name, seed)
        return fit(
            student, method, data.pairs(settings), settings,
            prompts=data.prompts, anchors=data.anchors(settings) if method.anchors else None,
            evaluate=lambda networks: _figures(self._scores(networks, data.prompts)),
            evaluate_every=self.recipe.evaluate_every or 0,
            after_read=None if self.say is None else _telling(self.say, str(options["label"])), **options,
        )  # fmt: skip

    def _data_of(self, method: Method) -> CLIPData:
        """Return the data with the captions of a method."""
        return self.data.captioned_for(method) if isinstance(self.data, PhotoData) else self.data

    def _lacks_models(self, name: str, seed: int) -> bool:
        """Return whether the models of a run are to be saved and are not, in all processes the same."""
        return self.save_models and not processes.broadcast_from_main(self.models(name, seed).exists())

    def _checkpoints(self, name: str, seed: int) -> list[Path]:
        """Return the checkpoints from which the networks of a finished run can be read again."""
        method = self.recipe.method(name)
        trained = self.recipe.trained(name)
        count = 1 if method.merge is None else method.merge.models
        seeds = range(count * seed, count * (seed + 1)) if trained.trains else ()
        files = (self.loop_options(trained.name, s)["checkpoint"] for s in seeds)
        return [file for file in files if file is not None]

    def _save(self, name: str, seed: int, end: Fit) -> None:
        """Save student and teacher as model folders."""
        if processes.is_main():
            folder, data = self.models(name, seed), self._data_of(self.recipe.trained(name))
            export.save_all(end.networks, folder, data.prompts, data.preprocessing)  # type: ignore[arg-type]

    def _scores(self, networks: Mapping[str, nn.Module], prompts: Prompts) -> dict[str, dict[str, Scores]]:
        """Score student and teacher on the test sets."""
        return {
            side: self.evaluate(network, prompts=prompts)  # type: ignore[arg-type]
            for side, network in networks.items()
        }

    def _merged(self, merge: Merge, seed: int) -> Fit:
        """Return weights between the pretrained and the fine-tuned ones."""
        method = self.recipe.method(merge.of)
        student = build_student(method, deepcopy(self.towers), self._data_of(method).prompts)
        ends = [self._finished(method, merge.models * seed + i) for i in range(merge.models)]
        states = [end.student.state_dict() for end in ends]
        start = student.state_dict()
        alpha = merge.alpha
        merged = model_stock(start, states) if alpha is None else interpolate(start, states[0], alpha)
        student.load_state_dict(merged)
        return Fit(student, history=loop.History(seconds=sum(end.history.seconds for end in ends)))

    def _tables(
        self, series: Mapping[str, list[tuple[int, float]]], scores: Mapping[str, Mapping[str, Scores]]
    ) -> dict[str, Table]:
        """Return the tables of a run."""
        tables = {"gaps": Table(("step", "gap"), series["gap"])} if "gap" in series else {}
        watched = [
            (step, *name.split("/"), value)
            for name, values in series.items()
            if name.startswith(tuple(f"{side}/" for side in SIDES))
            for step, value in values
        ]
        if watched:
            last = self.recipe.finetune.steps
            watched += [(last, *name.split("/"), value) for name, value in _figures(scores).items()]
            tables["epochs"] = Table(("step", "model", "set", "figure", "value"), watched)
        rows = [
            (side, test, *row)
            for side, sets in scores.items()
            for test, s in sets.items()
            for row in s.reliability
        ]
        tables["reliability"] = Table(("model", "set", "confidence", "accuracy", "share"), rows)
        return tables

    def _depends(self, recipe: FromScratchRecipe) -> dict[str, Any]:
        """Return all that pre-trained towers depend on; the number of threads and processes only rounds."""
        return {
            "model": recipe.model,
            "towers": open_clip.get_model_config(recipe.model),
            **self._pretraining_data.fingerprint(),
            "pretrain": recipe.pretrain.run_config(),
            "method": METHODS["flyp"].settings(),
            "device": self.device.type,
            "versions": [torch.__version__, open_clip.__version__, timm.__version__],
            "checkpoint": loop.FORMAT,
        }


def _pretrained(recipe: FileRecipe) -> tuple[Towers, Tokenizer]:
    """Build a recipe's towers with their weights."""
    torch.manual_seed(recipe.finetune.seed)  # for towers without weights
    with processes.main_process_first():  # the first may download
        return build(recipe.model, recipe.pretrained)


def _initial(recipe: FromScratchRecipe) -> tuple[Towers, Tokenizer]:
    """Return towers with random weights, and their tokenizer."""
    torch.manual_seed(recipe.pretrain.seed)
    return build(recipe.model)


def _figures(scores: Mapping[str, Mapping[str, Scores]]) -> dict[str, float]:
    """Return scores by names such as `student/imagenet/accuracy`."""
    return {
        f"{side}/{name}/{figure}": getattr(s, figure)
        for side, sets in scores.items()
        for name, s in sets.items()
        for figure in ("accuracy", "ece")
    }


def _telling(say: Callable[[str], None], label: str) -> Callable[[int, Mapping[str, float]], None]:
    """Return a function that says the accuracies of an evaluation."""

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
