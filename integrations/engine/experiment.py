"""Experiments: run methods over a recipe, look finished runs up, resume interrupted ones, record results."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch

from wmateacher.integrations.engine import loop, processes
from wmateacher.integrations.engine.results import Results, environment, run_name, write_csv

__all__ = ["Experiment", "Outcome", "Table"]

RecipeT = TypeVar("RecipeT")


class Table(NamedTuple):
    """A table that a run leaves as CSV.

    Attributes:
        header: The names of the columns.
        rows: The rows.
    """

    header: Sequence[str]
    rows: Iterable[Sequence[Any]]


@dataclass
class Outcome:
    """The outcome of one method with one seed.

    Attributes:
        record: The entry in `results.json`: numbers, strings, and mappings of them.
        tables: Tables by the name of their folder, such as `"gaps"`.
    """

    record: dict[str, Any]
    tables: Mapping[str, Table] = field(default_factory=dict)


class Experiment(ABC, Generic[RecipeT]):
    """A recipe with its data loaded, and the folder of its results. A task implements `train`.

    The folder holds `results.json`, one CSV file `TABLE/METHOD-SEED.csv` for each table of a run, and
    `checkpoints/`. A folder with results of the same configuration is continued: finished runs are not
    repeated, and an interrupted one resumes from its checkpoint.

    Args:
        recipe: The recipe to run, a dataclass.
        output: The folder.
        device: The device to train on.
        progress: Whether to show progress bars.

    Attributes:
        packages: Packages whose versions `results.json` names.
        pretraining: The number of the pre-training that the next runs start from, or None if the task has no
            pre-training of its own.

    Raises:
        ValueError: If the folder holds results of another configuration.
    """

    packages: ClassVar[tuple[str, ...]] = ()
    pretraining: int | None = None

    def __init__(
        self, recipe: RecipeT, output: Path, *, device: torch.device | str = "cpu", progress: bool = True
    ):
        self.recipe, self.output, self.progress = recipe, output, progress
        self.device = torch.device(device)
        where = environment(self.device, self.packages)
        self._results = Results(output, asdict(recipe), where, ["checkpoint_every", "summary"])  # type: ignore[call-overload]

    @abstractmethod
    def train(self, name: str, seed: int) -> Outcome:
        """Train one method with one seed and evaluate it."""

    def run(self, name: str, seed: int = 0) -> dict[str, Any]:
        """Train, evaluate and record one method, unless it is recorded already.

        Args:
            name: The name of the method.
            seed: The seed, added to that of the recipe's settings.

        Returns:
            The record of this seed; `results["methods"]` has the means over all seeds so far.
        """
        self._results.claim()
        recorded = self._results.recorded(name, seed, self.pretraining or 0)
        if recorded is not None:
            return recorded
        try:
            outcome = self.train(name, seed)
        except Exception:
            self._results.withdraw()  # a run that could not start, such as for a missing package
            raise
        if processes.is_main():
            for what, table in outcome.tables.items():
                write_csv(*table, self.file(what, name, seed))
        start = {} if self.pretraining is None else {"pretraining": self.pretraining}
        record = {"seed": seed, **start, **outcome.record}
        self._results.record(name, record)
        return record

    @property
    def results(self) -> dict[str, Any]:
        """The content of `results.json`."""
        return self._results.content

    def file(self, what: str, name: str, seed: int) -> Path:
        """Return the file of one of the tables of a run, such as `"gaps"`."""
        return self.output / what / f"{self.run_name(name, seed)}.csv"

    def run_name(self, name: str, seed: int) -> str:
        """Return the name of the files of a run from the present pre-training."""
        return run_name(name, seed, self.pretraining or 0)

    def loop_options(self, name: str, seed: int) -> loop.ResumeOptions:
        """Return the options of `loop.train` that make a run resumable and name it."""
        return {
            "checkpoint": self.output / "checkpoints" / f"{self.run_name(name, seed)}.pt",
            "label": self.label(name, seed),
            "progress": self.progress,
        }

    def label(self, name: str, seed: int) -> str:
        """Return the name of a run for the reader."""
        return f"{name} (seed {seed}" + (f", pre-training {self.pretraining})" if self.pretraining else ")")
