"""Measure the CPU seconds of imports and of each example's `--help`, in fresh interpreters.

    python benchmarks/startup.py

Each row is the median over `--rounds` starts, user and system time together, after one that fills the caches.
The table is printed and written to results.json.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from wmateacher.integrations.engine.results import environment, write_json

ROOT = Path(__file__).parents[1]
EXAMPLES = ("clip_tracer", "dino_pretrain", "mean_teacher", "self_distillation")
STARTS = {
    "import torch": ["-c", "import torch"],
    "import wmateacher": ["-c", "import wmateacher"],
    **{f"{name}.py --help": [str(ROOT / f"examples/{name}.py"), "--help"] for name in EXAMPLES},
}


def main() -> None:
    """Measure, print and write results.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="starts of each kind (default: 5)")
    parser.add_argument("--output", type=Path, default=Path("runs/startup"))
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {arguments.rounds}")
    results: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "environment": environment("cpu", ("scipy", "tyro")),
        "seconds": {name: measure(start, arguments.rounds) for name, start in STARTS.items()},
    }
    write_json(results, arguments.output / "results.json")
    print(f"{table(results)}\n\nwrote {arguments.output}/results.json")


def measure(start: list[str], rounds: int) -> float:
    """Return the median CPU seconds of a Python process that is started with these arguments."""
    seconds = []
    for _ in range(rounds + 1):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *start], stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(seconds[1:])


def table(results: dict[str, Any]) -> str:
    """Return a line for each start: its CPU seconds, and those above `import torch`."""
    seconds = results["seconds"]
    rows = [f"{name:<24}{s:>8.2f}{s - seconds['import torch']:>14.2f}" for name, s in seconds.items()]
    return "\n".join([f"{'start':<24}{'CPU s':>8}{'above torch':>14}", *rows])


if __name__ == "__main__":
    main()
