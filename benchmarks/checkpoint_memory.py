"""Measure the peak memory of averaging many large checkpoints.

    python benchmarks/checkpoint_memory.py

Write one checkpoint, link it under many names (on disk it is one file), average them all in a separate
process, and report how much that process grew. Runs on Linux only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from wmateacher import posthoc
from wmateacher.files import save
from wmateacher.integrations.engine.results import environment, write_json

GIB = 2**30


def main() -> None:
    """Measure, print, and write results.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=2.0, help="size of each checkpoint in GiB (default: 2)")
    parser.add_argument("--count", type=int, default=20, help="number of checkpoints (default: 20)")
    parser.add_argument("--suffix", default=".safetensors", choices=[".safetensors", ".pt"])
    parser.add_argument("--kernel", default="beta(0.5,0.5)")
    parser.add_argument("--output", type=Path, default=Path("runs/checkpoint-memory"))
    parser.add_argument("--files", nargs="+", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.files:
        average(arguments.files, arguments.kernel)
        return
    if arguments.gib <= 0 or arguments.count < 1:
        parser.error(f"--gib and --count must be above 0, got {arguments.gib} and {arguments.count}")
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i:03d}{arguments.suffix}" for i in range(arguments.count)]
        rows = max(1, round(arguments.gib * GIB / 4 / 20 / 1024))
        save({f"layer{i}": torch.randn(rows, 1024) for i in range(20)}, files[0])
        for file in files[1:]:
            os.link(files[0], file)
        command = [sys.executable, __file__, "--kernel", arguments.kernel, "--files", *map(str, files)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peak, seconds = map(float, done.stdout.split())
        size = files[0].stat().st_size
    results: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "environment": environment("cpu"),
        "checkpoints": {
            "count": arguments.count,
            "gib": size / GIB,
            "peak_gib": peak / GIB,
            "ratio": peak / size,
            "seconds": seconds,
        },
    }
    write_json(results, arguments.output / "results.json")
    print(table(results))


def average(files: list[Path], kernel: str) -> None:
    """Average the files, and print by how many bytes this process grew and the seconds it took."""
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    started = time.perf_counter()
    posthoc.average_checkpoints(files, kernel)
    print(_status("VmHWM") - before, time.perf_counter() - started)


def _status(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return 1024 * int(line.split()[1])


def table(results: dict[str, Any]) -> str:
    """Return the line that is printed and shown in benchmarks/results."""
    row = results["checkpoints"]
    return (
        f"{row['count']} checkpoints of {row['gib']:.2f} GiB: peak {row['peak_gib']:.2f} GiB, "
        f"{row['ratio']:.2f} of one, {row['seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
