"""Teach a pretrained model something new by several methods, and measure what it keeps."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from wmateacher.integrations.engine import experiment, processes, training
from wmateacher.integrations.engine.experiment import Outcome, Table
from wmateacher.integrations.language import model
from wmateacher.integrations.language.data import DEMONSTRATION, FACTS, World
from wmateacher.integrations.language.evaluation import scores
from wmateacher.integrations.language.recipes import LIVE, PRETRAINING, START, Recipe
from wmateacher.integrations.language.training import fit

__all__ = ["ACCURACIES", "Experiment", "columns", "pairs"]

ACCURACIES = {"new": ("student.new", 1), "kept": ("student.kept", 1)}
"""The columns that sum a method up: how much of what is new it learns, and of what was known it keeps."""


def columns(skills: Sequence[str]) -> dict[str, tuple[str, int]]:
    """Return the columns of the table of results: accuracies on test questions, the student's unless named.

    Args:
        skills: The skills of pre-training.
    """
    kept = {name: (f"student.{name}", 1) for name in (FACTS, *skills, DEMONSTRATION)}
    return {
        **ACCURACIES,
        **kept,
        "teacher new": ("teacher.new", 1),
        "teacher kept": ("teacher.kept", 1),
        "final gap": ("final_gap", 4),
        "seconds": ("seconds", 0),
    }


def pairs(names: Collection[str]) -> list[tuple[str, str]]:
    """Return the comparisons of interest: every teacher with a frozen one, a live one, and none.

    Args:
        names: The names of the methods, such as `sdft static`.
    """
    found = []
    for name in names:
        kind, _, kernel = name.partition(" ")
        others = [f"{kind} static", f"{kind} {LIVE}", "sft"] if kernel else []
        found += [
            (name, other)
            for other in others
            if other in names and other != name and (other, name) not in found
        ]
    return found


class Experiment(experiment.Experiment[Recipe]):
    """A recipe, and the folder of its results, with tables `gaps` and `curves`.

    The seed of a run chooses everything: the facts, the pre-training and the learning of what is new. The
    pretrained model of each seed is kept in the folder, and all methods start from it. The method `"start"`
    is the pretrained model itself.

    Args:
        recipe: The recipe to run.
        output: The folder.
        device: The device to train on.
        progress: Whether to show progress bars.
        pretrained: The folder that keeps the pretrained models. Default: that of the checkpoints.
        say: Called with a line of text at every evaluation during pre-training.

    Raises:
        ValueError: If the folder holds results of another configuration, the facts do not fit the symbols, or
            TRL's trainers cannot run the recipe.
        ImportError: If Transformers is not installed, the recipe needs PEFT and it is not installed, or is
            for TRL, and that is missing or another version than the tested one.
        RuntimeError: If several processes run it.
    """

    packages = ("transformers", "peft", "trl")

    def __init__(
        self,
        recipe: Recipe,
        output: Path,
        *,
        device: torch.device | str = "cpu",
        progress: bool = True,
        pretrained: Path | None = None,
        say: Callable[[str], None] | None = None,
    ):
        self.say, self.pretrained_in = say, pretrained or output / "checkpoints"
        if not processes.is_single():
            raise RuntimeError(
                "the language models are too small for several processes: start one, without torchrun"
            )
        model.import_transformers()
        if recipe.lora_rank:
            model.import_peft()  # before minutes of pre-training, which need no adapters
        self._world(recipe, 0)
        if recipe.trainer == "trl":
            from wmateacher.integrations.language import trl_training

            trl_training.check(recipe)
        super().__init__(recipe, output, device=device, progress=progress)

    def train(self, name: str, seed: int) -> Outcome:
        """Train by the method `name` from the pretrained model of that seed, and evaluate."""
        recipe, world = self.recipe, self._world(self.recipe, seed)
        student = self.pretrained(seed)
        tests = world.examination("test", recipe.questions)
        if name == START:
            return Outcome(
                {"student": scores(student, tests), "teacher": None, "final_gap": None, "seconds": 0.0}
            )
        if recipe.lora_rank:
            student = model.with_lora(student, recipe.lora_rank)
        settings = replace(recipe.settings, seed=recipe.settings.seed + seed)
        before = scores(student, world.examination("validation", recipe.questions))
        options = self.loop_options(name, seed)
        learn: Callable[..., training.Fit] = fit
        if recipe.trainer == "trl":
            from wmateacher.integrations.language import trl_training

            learn = trl_training.fit
            del options["checkpoint"]
        fitted = learn(
            student, recipe.method(name), world.later(settings.batch_size), settings,
            evaluate=self._validation(world),
            evaluate_every=max(1, settings.steps // 10), evaluate_last=True, **options,
        )  # fmt: skip
        series = fitted.history.series
        found = {side: scores(network, tests) for side, network in fitted.networks.items()}
        record = {
            "trainer": recipe.trainer,
            "student": found["student"],
            "teacher": found.get("teacher"),
            "validation": {key: series[key][-1][1] for key in ("new", "kept")},
            "final_gap": series["gap"][-1][1] if "gap" in series else None,
            "seconds": fitted.history.seconds,
        }
        courses = zip(series["new"], series["kept"], strict=True)
        rows = [
            (0, before["new"], before["kept"]),
            *((step, new, kept) for (step, new), (_, kept) in courses),
        ]
        tables = {"curves": Table(("step", "new", "kept"), rows)}
        if "gap" in series:
            tables["gaps"] = Table(("step", "gap"), [(0, 0.0), *series["gap"]])
        return Outcome(record, tables)

    def pretrained(self, seed: int) -> nn.Module:
        """Return the pretrained model of a seed, from its checkpoint if there is one."""
        recipe = self.recipe
        settings = replace(recipe.pretrain, seed=recipe.pretrain.seed + seed)
        torch.manual_seed(settings.seed)
        student = model.build(recipe.symbols, recipe.width, recipe.depth).to(self.device)
        world, name = self._world(recipe, seed), PRETRAINING.name
        options = self.loop_options(name, seed)
        options["checkpoint"] = self.pretrained_in / f"{name}-{seed}.pt"
        fit(
            student, PRETRAINING, world.earlier(settings.batch_size), settings,
            evaluate=self._validation(world, f"{name} (seed {seed})"),
            evaluate_every=max(1, settings.steps // 4), **options,
        )  # fmt: skip
        return student

    def _validation(self, world: World, label: str | None = None) -> training.Evaluate:
        """Return a function that measures what the student knows on validation questions, and says it."""
        questions = world.examination("validation", self.recipe.questions)

        def evaluate(networks: Mapping[str, nn.Module]) -> dict[str, float]:
            found = scores(networks["student"], questions)
            if self.say is not None and label is not None:
                self.say(f"{label}: " + ", ".join(f"{name} {value:.0f}" for name, value in found.items()))
            return {"new": found["new"], "kept": found["kept"]}

        return evaluate

    @staticmethod
    def _world(recipe: Recipe, seed: int) -> World:
        return World(
            recipe.symbols, recipe.old_facts, recipe.new_facts, recipe.skills, recipe.new,
            recipe.settings.seed + seed,
        )  # fmt: skip
