"""An experiment on the command line: methods and seeds in turn, with a line for each result."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from wmateacher.integrations.engine import processes, signals
from wmateacher.integrations.engine.experiment import Experiment

__all__ = ["conduct", "folder", "resumable", "say"]


def folder(given: Path | None, name: str) -> Path:
    """Return the given results folder, or by default a new one in `runs/`; the same in all processes."""
    return processes.broadcast_from_main(given or Path(time.strftime(f"runs/{name}-%Y%m%d-%H%M%S")))


def say(text: str) -> None:
    """Print a line above the progress bar, in the main process only."""
    if processes.is_main():
        tqdm.write(text)
        sys.stdout.flush()


@contextmanager
def resumable(output: Path) -> Iterator[None]:
    """Say how to continue if Ctrl-C or SIGTERM ends the block."""
    try:
        yield
    except signals.Terminated as ended:
        print(f"\n{ended}; {_how_to_continue(output)}", file=sys.stderr)
        raise
    except KeyboardInterrupt:
        print(f"\ninterrupted; {_how_to_continue(output)}", file=sys.stderr)
        sys.exit(130)


def _how_to_continue(output: Path) -> str:
    return f"the same command with --output {output} continues this run"


def conduct(
    experiment: Experiment[Any],
    names: Iterable[str],
    seeds: int,
    headline: Callable[[Mapping[str, Any]], str],
    starts: Sequence[Callable[[], object]] = (lambda: None,),
) -> None:
    """Run every method with every seed from every start: all methods first, so that they can be compared.

    Args:
        experiment: The experiment, which records the results.
        names: The names of the methods.
        seeds: The number of seeds, from 0.
        headline: Summarises a record in a few words.
        starts: Called before the runs from each start, such as a pre-training.
    """
    names = list(names)
    for seed in range(seeds):
        for start in starts:
            start()
            for name in names:
                say(f"{experiment.label(name, seed)}: {headline(experiment.run(name, seed))}")
