"""Measure the memory of a teacher and of one update, beside other averaging helpers.

    python benchmarks/memory.py

Each cell runs in a separate process, which builds the student, then the helper, and then updates. *Held* is
the memory that the helper adds to the process beside the student. *Peak* is how far the memory in use
rises during the first two updates. On a CPU both measure the resident memory of the process (Linux only),
on a GPU the memory that torch has allocated.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import averagers
import torch

from wmateacher.integrations.engine.results import environment, write_json

PACKAGES = ("timm", "open_clip_torch", "peft", "ema-pytorch", "torch-ema")
MIB = 2**20


def main() -> None:
    """Measure, print, and write results.json and memory.png."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=averagers.MODELS, default=list(averagers.MODELS))
    parser.add_argument(
        "--helpers", nargs="+", choices=averagers.AVERAGERS, help="default: all that differ on the device"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("runs/memory"))
    arguments = parser.parse_args()
    helpers = arguments.helpers or averagers.on(arguments.device)
    if arguments.device == "cpu" and not Path("/proc/self/clear_refs").exists():
        parser.error("measuring a CPU's memory needs Linux (/proc/self/clear_refs)")
    results: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "environment": environment(arguments.device, PACKAGES),
        "models": {},
    }
    # A fresh process for each cell: what another has freed would be used again unseen.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for model in arguments.models:
            for precision in averagers.PRECISIONS:
                name = f"{model}, {precision} -> fp32"
                cells = [(model, precision, helper, arguments.device) for helper in helpers]
                rows = dict(zip(helpers, pool.map(measure, cells, chunksize=1), strict=True))
                results["models"][name] = rows
                write_json(results, arguments.output / "results.json")
                print(f"{table(name, rows)}\n", flush=True)
    picture(results, arguments.output / "memory.png")
    print(f"wrote {arguments.output}/results.json, memory.png")


def measure(cell: tuple[str, str, str, str]) -> dict[str, Any]:
    """Return the held and peak memory of one helper, in MiB."""
    model, precision, helper, device = cell
    torch.set_num_threads(1)
    averagers.start(helper, averagers.Small().to(device))  # a first use loads libraries that stay in memory
    student = averagers.build(model, precision, device)
    trained = sum(p.nbytes for p in averagers.averaged(student)) / MIB
    before = in_use(device)
    try:
        made = averagers.AVERAGERS[helper](student)
        held = in_use(device)
        reset_peak(device)
        for _ in range(2):
            made.update()
    except (RuntimeError, TypeError, ValueError) as error:
        return {"trained_mib": trained, "error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    return {
        "trained_mib": trained,
        "held_mib": (held - before) / MIB,
        "peak_mib": (peak(device) - held) / MIB,
    }


def in_use(device: str) -> int:
    """Return the bytes in use now, after returning freed memory to the system."""
    gc.collect()
    if device != "cpu":
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status("VmRSS")


def reset_peak(device: str) -> None:
    """Reset the peak that `peak` returns."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: str) -> int:
    """Return the largest number of bytes in use since `reset_peak`."""
    return torch.cuda.max_memory_allocated(device) if device != "cpu" else _status("VmHWM")


def _status(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return 1024 * int(line.split()[1])


def table(name: str, rows: dict[str, Any]) -> str:
    """Return one model's table, as printed and as shown in benchmarks/results."""
    trained = max(row.get("trained_mib", 0) for row in rows.values())
    lines = [f"{name}: {trained:,.1f} MiB trained", f"{'':34} {'held MiB':>9} {'peak MiB':>9}"]
    for helper, row in rows.items():
        if "error" in row:
            lines.append(f"{helper:34} {row['error'][:76]}")
        else:
            lines.append(f"{helper:34} {row['held_mib']:9.1f} {row['peak_mib']:9.1f}")
    return "\n".join(lines)


def picture(results: dict[str, Any], file: Path) -> None:
    """Draw held and peak memory, one panel per model."""

    def draw(axis: Any, rows: dict[str, Any]) -> None:
        helpers = [h for h in reversed(rows) if "error" not in rows[h]]
        held = [max(rows[h]["held_mib"], 0) for h in helpers]
        axis.barh(helpers, held, color=averagers.colours(helpers))
        axis.barh(helpers, [max(rows[h]["peak_mib"], 0) for h in helpers], left=held, color="tab:orange")

    label = "MiB held beside the student; orange: peak of an update above it"
    averagers.panels(results["models"], draw, label, file)


if __name__ == "__main__":
    main()
