"""An experiment from the command line: methods and seeds in turn, what is found said as it comes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from wmateacher.integrations.engine import processes, signals


class Experiment(Protocol):
    """What can be run by name and seed."""

    def run(self, name: str, seed: int = 0) -> Mapping[str, Any]:
        """Run, or look up, one method with one seed; its record."""
        ...


def check_seeds(seeds: int) -> None:
    """See that there is something to run.

    Raises:
        ValueError: There are no seeds.
    """
    if seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {seeds}")


def folder(given: Path | None, name: str) -> Path:
    """Where results go: what was given, or a new folder in `runs/`, the same in all processes."""
    return processes.broadcast_from_main(given or Path(time.strftime(f"runs/{name}-%Y%m%d-%H%M%S")))


def say(text: str) -> None:
    """Print it above any progress bar, once however many processes there are."""
    if processes.is_main():
        tqdm.write(text)
        sys.stdout.flush()


@contextmanager
def resumable(output: Path) -> Iterator[None]:
    """Ctrl-C, and SIGTERM, end the program with word of how to go on."""
    try:
        yield
    except signals.Terminated as ended:
        print(f"\n{ended}; the same command with --output {output} goes on from here", file=sys.stderr)
        raise
    except KeyboardInterrupt:
        print(f"\ninterrupted; the same command with --output {output} goes on from here", file=sys.stderr)
        sys.exit(130)


def conduct(
    experiment: Experiment,
    names: Iterable[str],
    seeds: int,
    headline: Callable[[Mapping[str, Any]], str],
) -> None:
    """Run every method with every seed.

    Args:
        experiment: Keeps its records itself.
        names: Of the methods.
        seeds: How many, from 0.
        headline: A record in a few words.
    """
    names = list(names)
    for seed in range(seeds):
        for name in names:
            say(f"{name} (seed {seed}): {headline(experiment.run(name, seed))}")
