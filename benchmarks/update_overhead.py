"""Time one update of the average, beside other averaging helpers and the speed of the memory.

    python benchmarks/update_overhead.py

An update must read the student, and read and write the float32 average: 12 bytes per parameter from
float32, 10 from bfloat16. A helper that also keeps the average in the student's dtype, for the forward,
writes 2 more. The floor is a flat lerp that moves as many bytes. All helpers and floors of one model take
turns in one process. `ms`, `floor` and their `ratio` are medians over the rounds. `fastest` is the ratio
of the fastest rounds. `of copy` is the bandwidth of the update relative to that of a large copy.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import averagers
import torch
from torch import nn

from wmateacher.integrations.engine.results import environment, write_json

PACKAGES = ("timm", "open_clip_torch", "peft", "ema-pytorch", "torch-ema")


def main() -> None:
    """Measure, print, and write results.json and overhead.png."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=averagers.MODELS, default=list(averagers.MODELS))
    parser.add_argument("--rounds", type=int, default=15, help="timed updates per helper (default: 15)")
    parser.add_argument(
        "--helpers", nargs="+", choices=averagers.AVERAGERS, help="default: all that differ on the device"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--output", type=Path, default=Path("runs/update-overhead"))
    arguments = parser.parse_args()
    helpers = arguments.helpers or averagers.on(arguments.device)
    if arguments.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {arguments.rounds}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if (device := torch.device(arguments.device)).index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # on which events and `synchronize` work by default
    results: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "environment": environment(arguments.device, PACKAGES),
        "copy_bandwidth_gb_s": copy_bandwidth(arguments.device),
        "models": {},
    }
    for model in arguments.models:
        for precision in averagers.PRECISIONS:
            name = f"{model}, {precision} -> fp32"
            student = averagers.build(model, precision, arguments.device)
            measured = measure(student, helpers, arguments.rounds, arguments.device)
            for row in measured["helpers"].values():
                speed = row["bytes"] / row["milliseconds"] / 1e6
                row["share_of_copy_bandwidth"] = speed / results["copy_bandwidth_gb_s"]
            results["models"][name] = measured
            write_json(results, arguments.output / "results.json")
            print(f"{table(name, measured)}\n", flush=True)
    picture(results, arguments.output / "overhead.png")
    print(f"wrote {arguments.output}/results.json, overhead.png")


def measure(student: nn.Module, helpers: list[str], rounds: int, device: str) -> dict[str, Any]:
    """Return medians over rounds; in each round every helper and every floor takes a turn."""
    numel = sum(p.numel() for p in averagers.averaged(student))
    read = averagers.averaged(student)[0].itemsize
    jobs: dict[str, Callable[[], object]] = {}
    bytes_moved, errors = {}, {}
    for name in helpers:
        made = averagers.start(name, student)
        if isinstance(made, str):
            errors[name] = made
            continue
        jobs[name] = made.update
        bytes_moved[name] = numel * (read + 8 + (read if made.forward else 0))
    floors = {}
    for total in sorted(set(bytes_moved.values())):
        a, b = (torch.randn(total // 12, device=device) for _ in range(2))
        floors[total] = f"floor {total}"
        jobs[floors[total]] = lambda a=a, b=b: a.lerp_(b, 1e-3)
    times: dict[str, list[float]] = {name: [] for name in jobs}
    hosts: dict[str, list[float]] = {name: [] for name in jobs}
    with torch.no_grad():
        for i in range(rounds + 2):
            for name, job in jobs.items():
                seconds, host = timed(job, device)
                if i >= 2:
                    times[name].append(seconds)
                    hosts[name].append(host)
    medians = {name: statistics.median(t) for name, t in times.items()}
    return {
        "averaged_parameters": numel,
        "tensors": len(averagers.averaged(student)),
        "helpers": {
            name: {
                "milliseconds": 1e3 * medians[name],
                "fastest_milliseconds": 1e3 * min(times[name]),
                "host_milliseconds": 1e3 * statistics.median(hosts[name]),
                "bytes": moved,
                "floor_milliseconds": 1e3 * medians[floors[moved]],
                "ratio_to_floor": medians[name] / medians[floors[moved]],
                "fastest_ratio_to_floor": min(times[name]) / min(times[floors[moved]]),
            }
            for name, moved in bytes_moved.items()
        },
        "errors": errors,
    }


def timed(job: Callable[[], object], device: str) -> tuple[float, float]:
    """Return the seconds that a job takes, and those after which the host can go on.

    On a GPU the former are between two events in its stream.
    """
    if torch.device(device).type == "cpu":
        start = time.perf_counter()
        job()
        return (time.perf_counter() - start,) * 2
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    start = time.perf_counter()
    job()
    host = time.perf_counter() - start
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3, host


def copy_bandwidth(device: str, size: int = 2**28) -> float:
    """Return the bandwidth of a large copy in GB/s, reads and writes together: the median of nine copies.

    Args:
        device: The device.
        size: The number of bytes to copy.
    """
    a, b = (torch.zeros(size // 4, device=device) for _ in range(2))
    seconds = statistics.median([timed(lambda: a.copy_(b), device)[0] for _ in range(10)][1:])
    return 2 * a.nbytes / seconds / 1e9


def table(name: str, measured: dict[str, Any]) -> str:
    """Return one model's table, as printed and as shown in benchmarks/results."""
    lines = [
        f"{name}: {measured['averaged_parameters']:,} averaged parameters in {measured['tensors']:,} tensors",
        f"{'':34} {'ms':>8} {'floor':>8} {'ratio':>7} {'fastest':>8} {'of copy':>8}",
    ]
    for helper, row in measured["helpers"].items():
        lines.append(
            f"{helper:34} {row['milliseconds']:8.2f} {row['floor_milliseconds']:8.2f} "
            f"{row['ratio_to_floor']:7.2f} {row['fastest_ratio_to_floor']:8.2f} "
            f"{row['share_of_copy_bandwidth']:8.0%}"
        )
    lines += [f"{helper:34} {error[:76]}" for helper, error in measured["errors"].items()]
    return "\n".join(lines)


def picture(results: dict[str, Any], file: Path) -> None:
    """Draw the time of an update and its floor, one panel per model."""

    def draw(axis: Any, measured: dict[str, Any]) -> None:
        helpers = list(reversed(measured["helpers"]))
        rows = [measured["helpers"][h] for h in helpers]
        bars = axis.barh(helpers, [row["milliseconds"] for row in rows], color=averagers.colours(helpers))
        axis.plot([row["floor_milliseconds"] for row in rows], helpers, "k|", markersize=9)
        labels = [f"{row['milliseconds']:.1f} ms, {row['ratio_to_floor']:.2f}x" for row in rows]
        axis.bar_label(bars, labels, padding=3, fontsize=8)
        axis.set_xscale("log")
        axis.set_xlim(right=max(row["milliseconds"] for row in rows) * 8)

    drawn = {name: measured for name, measured in results["models"].items() if measured["helpers"]}
    averagers.panels(drawn, draw, "ms per update; black: a flat lerp that moves as many bytes", file)


if __name__ == "__main__":
    main()
