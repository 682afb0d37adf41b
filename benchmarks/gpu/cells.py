"""Training runs of experiments, several at a time, until the time is up."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gpu.record import Options, Record, described
from wmateacher.integrations.engine import tables
from wmateacher.integrations.engine.results import file_name


@dataclass(frozen=True)
class Study:
    """An experiment and the runs to make of it.

    Attributes:
        name: The name in the results.
        open: Makes the experiment, from the recipe, the options and the name; a function of a module, which
            worker processes import.
        recipe: The recipe.
        methods: The names of the methods, in order.
        seeds: The number of seeds of each method.
        prepare: Called once before the runs, with the experiment, such as for pre-training; or None.
        later: Methods whose first seed follows the third of the others.
    """

    name: str
    open: Callable[[Any, Options, str], Any]
    recipe: Any
    methods: Sequence[str]
    seeds: int
    prepare: Callable[[Any], Any] | None = None
    later: Sequence[str] = ()

    @property
    def config(self) -> str:
        """The recipe as JSON."""
        return json.dumps(asdict(self.recipe), sort_keys=True, default=str)

    @property
    def key(self) -> str:
        """The name with a digest of the recipe, which tells its runs from those of any other recipe."""
        return f"{self.name} ({hashlib.sha256(self.config.encode()).hexdigest()[:8]})"


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        study: The study.
        method: The method, or None for what the study prepares.
        seed: The seed.
    """

    study: Study
    method: str | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """The name in the results."""
        return f"{self.study.key}: {self.method}, seed {self.seed}"

    @property
    def turn(self) -> int:
        """The place among the runs; equal ones follow the order of studies and methods."""
        return -1 if self.method is None else self.seed + 3 * (self.method in self.study.later)


def measure(studies: Sequence[Study], record: Record, options: Options) -> None:
    """Make the runs of several studies, in turn by seed, and keep each as soon as it has ended."""
    known = {cell.name for study in studies for cell in cells(study)}
    record.content["results"] |= {name: r for name, r in record.before.items() if name in known}
    record.content["recipes"] = {study.key: json.loads(study.config) for study in studies}
    record.write()
    ready = [cell for study in studies for cell in first(study)]
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        options.jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
    )
    running: dict[Future[Any], Cell] = {}
    try:
        while (ready or running) and record.remaining() > 0:
            ready.sort(key=lambda cell: cell.turn)
            while ready and len(running) < options.jobs:
                cell = ready.pop(0)
                if cell.name not in record.content["results"]:
                    running[pool.submit(run, cell, options)] = cell
            done, _ = wait(running, max(record.remaining(), 0), FIRST_COMPLETED)
            for future in done:
                ready += finish(running.pop(future), future, record)
    finally:
        cut = {cell.study.key: cell.study for cell in [*running.values(), *ready]}
        for study in cut.values():
            runs = [cell.name for cell in cells(study)]
            missing = sum(name not in record.content["results"] for name in runs)
            record.skip(study.name, f"no time left for {missing} of {len(runs)} runs")
        # Killed, because a training run that is only asked to end would first save its state.
        for process in list(pool._processes.values()) if running else ():
            process.kill()
        pool.shutdown(wait=True, cancel_futures=True)


def cells(study: Study) -> Iterable[Cell]:
    """Return all runs of a study."""
    return [Cell(study, method, seed) for seed in range(study.seeds) for method in study.methods]


def first(study: Study) -> Iterable[Cell]:
    """Return what can be run at the start: the preparation, or all runs if there is none."""
    return cells(study) if study.prepare is None else [Cell(study)]


def finish(cell: Cell, future: Future[Any], record: Record) -> Iterable[Cell]:
    """Keep the result of a run, and return the runs that can be made now."""
    error = future.exception()
    what = cell.name if cell.method is not None else f"{cell.study.name}: preparation"
    if isinstance(error, ImportError):
        record.skip(what, described(error))
    elif error is not None:
        record.fail(what, described(error))
    elif cell.method is None:
        record.say(f"{cell.study.name}: prepared")
        return cells(cell.study)
    else:
        result = {**future.result(), "commit": record.options.commit, "date": record.options.date}
        record.add(cell.name, result)
        record.say(f"{cell.name}: {result.get('seconds', 0):.0f} s of training")
    return ()


_OPEN: dict[str, Any] = {}
"""The experiments that this process has opened."""


def run(cell: Cell, options: Options) -> Any:
    """Make one run, in a worker process, and return its record."""
    study = cell.study
    if study.key not in _OPEN:
        experiment = study.open(study.recipe, options, file_name(study.key))
        if study.prepare is not None:
            study.prepare(experiment)  # what another process has prepared is loaded
        _OPEN[study.key] = experiment
    return None if cell.method is None else _OPEN[study.key].train(cell.method, cell.seed).record


def table(results: Mapping[str, Any], columns: Mapping[str, tuple[str, int]]) -> str:
    """Return a table for each study: for each method the means over seeds, with their deviations.

    Args:
        results: The results, by the names of cells.
        columns: Heading -> (dotted path in a record, digits).
    """
    studies: dict[str, dict[str, list[Any]]] = {}
    for name, result in results.items():
        study, _, rest = name.partition(": ")
        studies.setdefault(study, {}).setdefault(rest.rpartition(", seed ")[0], []).append(result)
    parts = []
    for study, methods in studies.items():
        rows = []
        for method, found in methods.items():
            row = {"method": method, "seeds": str(len(found))}
            for heading, (path, digits) in columns.items():
                values = [v for r in found if (v := tables.look_up(r, path)) is not None]
                spread = f" ±{statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
                row[heading] = f"{statistics.fmean(values):.{digits}f}{spread}" if values else ""
            rows.append(row)
        parts.append(f"{study}\n{tables.aligned(rows)}")
    return "\n\n".join(parts)
