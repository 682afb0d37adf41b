"""Compare the teacher's kernels on one task, over distillation weights and seeds.

    python benchmarks/kernel_sweep.py
    python benchmarks/kernel_sweep.py --seeds 3 --pretrainings 3
    python benchmarks/kernel_sweep.py --seeds 3 --distill-weights 0.5 0.9
    python benchmarks/kernel_sweep.py --kernels 'beta(0.3,0.3)' 'ema(0.995)' none --output DIR
    python benchmarks/kernel_sweep.py --data emoji --data-root DIR
    python benchmarks/kernel_sweep.py --task mean-teacher --data mnist --data-root DIR
    python benchmarks/kernel_sweep.py --task lm --distill-weights 0.3 1 3

Cells run side by side, one process and one thread each. Each writes its result when it is done, and the
same command with the same --output continues where it stopped. The folder gets results.json, cells.csv,
pictures for light and dark pages, and two pages that open offline: report.html, and explorer.html, in which
you choose kernels and distillation weights. Every kernel is compared with a --baseline in pairs: runs from
the same pre-training with the same seed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import sweep_explorer
import sweep_report
import torch
from sweep_tasks import TASKS, Cell, Task

from wmateacher import kernels
from wmateacher.integrations.engine.results import environment, read_json, write_json
from wmateacher.integrations.engine.signals import Terminated

KERNELS = (
    "none",
    "static",
    "beta(0.2,0.2)",
    "beta(0.5,0.5)",
    "beta(1.5,1.5)",
    "beta(0.5,1.0)",
    "uniform",
    "tail(0.25)",
    "power(sigma_rel=0.1)",
    "ema(0.9)",
    "ema(0.99)",
    "ema(0.999)",
    "power(exponent=-0.5)",
    "gap(0.5)",
)
QUICK = ("none", "static", "beta(0.5,0.5)", "uniform", "ema(0.99)")
PACKAGES = ("open_clip_torch", "timm", "torchvision", "torchmetrics", "scikit-learn", "transformers")


def main() -> int:
    """Run the missing cells of the sweep, and report on all of them."""
    arguments = parsed()
    task = TASKS[arguments.task](
        arguments.data, arguments.data_root, arguments.steps, arguments.pretrain_steps,
        arguments.output, arguments.cache,
    )  # fmt: skip
    cells = [
        Cell(kernel, distill_weight, seed, pretraining)
        for pretraining in range(arguments.pretrainings)
        for seed in range(arguments.seeds)
        for distill_weight in arguments.distill_weights
        for kernel in arguments.kernels
        if kernel != "none" or distill_weight == arguments.distill_weights[0]
    ]
    config = {"task": arguments.task, "data": arguments.data, "total_steps": task.total_steps,
              "pretrain_steps": task.pretraining}  # fmt: skip
    results = opened(arguments.output / "results.json", config, task)
    missing = [cell for cell in cells if record_of(results, cell) is None]
    print(
        f"{len(cells)} cells, {len(missing)} to run, {arguments.jobs} at a time; "
        f"results in {arguments.output}"
    )
    failed = 0
    if missing:
        print(task.prepare(arguments.seeds, arguments.pretrainings), flush=True)
        failed = run_cells(task, missing, arguments.jobs, results, arguments.output)
    wanted = {**results, "cells": [r for c in cells if (r := record_of(results, c)) is not None]}
    if not wanted["cells"]:
        print("no cell has a result", file=sys.stderr)
        return 1
    print(f"\n{sweep_report.table(wanted)}\n\n{sweep_report.differences(wanted, arguments.baseline)}\n")
    if task.theory:
        print(f"{sweep_report.correlations(wanted)}\n")
    if arguments.quick:
        print(
            f"--quick shows that everything runs. After {task.total_steps} steps the kernels hardly differ, "
            "so it shows nothing about their order.\n"
        )
    sweep_report.write(wanted, arguments.output, theory=task.theory, baseline=arguments.baseline)
    explorer = sweep_explorer.page({arguments.output.name: wanted}, arguments.baseline)
    (arguments.output / "explorer.html").write_text(explorer, "utf-8")
    print(f"wrote {arguments.output}/results.json, cells.csv, explorer.html, report.html and its pictures")
    return 1 if failed else 0


def parsed() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=TASKS, default="clip")
    parser.add_argument(
        "--data",
        help="digits, mnist, fashion-mnist, cifar10 or emoji; lm, sdft: facts or skill (default: the first)",
    )
    parser.add_argument("--data-root", type=Path, help="folder with the data, for all but digits")
    parser.add_argument("--kernels", nargs="+", help="specs as in wmateacher.kernels; none: no teacher")
    parser.add_argument(
        "--distill-weights", nargs="+", type=float,
        help="clip: lambda_SD (default: 0.9); mean-teacher: multiples of the recipe's weight (default: 1); "
        "lm: of the teacher's term (default: 1)",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=1, help="fine-tuning seeds (default: 1)")
    parser.add_argument(
        "--pretrainings", type=int, default=1,
        help="clip: pre-training seeds, each with all fine-tuning seeds (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--baseline", default=sweep_report.BASELINE,
        help="kernel that all others are compared with, in pairs of runs (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="cells at a time (default: the cores)"
    )
    parser.add_argument("--steps", type=int, help="fine-tuning steps (default: the recipe's)")
    parser.add_argument("--pretrain-steps", type=int, help="pre-training steps (default: the recipe's)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="five kernels, few steps: whether it runs, nothing about the kernels",
    )
    parser.add_argument("--output", type=Path, help="results folder; default: runs/kernel_sweep-TASK-DATA")
    parser.add_argument("--cache", type=Path, help="for pretrained towers; default: ~/.cache/wmateacher")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.kernels = arguments.kernels or list(QUICK)
        arguments.steps, arguments.pretrain_steps = arguments.steps or 60, arguments.pretrain_steps or 200
    task = TASKS[arguments.task]
    arguments.data = arguments.data or task.default_data
    suffix = "-quick" if arguments.quick else ""
    default = Path(f"runs/kernel_sweep-{arguments.task}-{arguments.data}{suffix}")
    arguments.output = arguments.output or default
    for name in ("seeds", "pretrainings", "jobs", "steps", "pretrain_steps"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    arguments.distill_weights = arguments.distill_weights or list(task.distill_weights)
    if min(arguments.distill_weights) <= 0:
        parser.error(
            f"--distill-weights must be above 0, got {min(arguments.distill_weights)}: "
            "--kernels none is no teacher"
        )
    try:
        specs = [k if k == "none" else str(kernels.build(k)) for k in arguments.kernels or KERNELS]
    except (ValueError, TypeError) as error:
        parser.error(f"--kernels: {error}")
    if not task.without and not arguments.quick and arguments.kernels and "none" in specs:
        parser.error(f"--kernels none: {arguments.task} has no run without a teacher")
    arguments.kernels = [k for k in dict.fromkeys(specs) if k != "none" or task.without]
    if arguments.pretrainings > 1 and not task.several_pretrainings:
        parser.error(
            f"--pretrainings: {arguments.task} has none to choose, got {arguments.pretrainings}: use --seeds"
        )
    try:
        if arguments.baseline != "none":
            arguments.baseline = str(kernels.build(arguments.baseline))
    except (ValueError, TypeError) as error:
        parser.error(f"--baseline: {error}")
    if arguments.baseline not in arguments.kernels and arguments.baseline != sweep_report.BASELINE:
        parser.error(f"--baseline {arguments.baseline} is not swept: add it to --kernels")
    return arguments


def opened(file: Path, config: dict[str, Any], task: Task) -> dict[str, Any]:
    """Return the results of the sweep so far.

    Raises:
        ValueError: If the folder holds another sweep.
    """
    if not file.exists():
        where = environment("cpu", PACKAGES)
        return {"config": config, "figures": task.figures, "environment": where, "cells": []}
    results = read_json(file)
    there = results.get("config", {})
    differing = [f"{k}={there.get(k)!r} there, {v!r} here" for k, v in config.items() if there.get(k) != v]
    if differing:
        raise ValueError(
            f"{file.parent} holds another sweep ({'; '.join(differing)}): choose another --output"
        )
    return results


def record_of(results: dict[str, Any], cell: Cell) -> dict[str, Any] | None:
    """Return the record of a cell, or None if it has not been run."""

    def key(record: dict[str, Any]) -> tuple[Any, ...]:
        return record["kernel"], record["distill_weight"], record["seed"], record.get("pretraining", 0)

    wanted = cell.kernel, cell.distill_weight, cell.seed, cell.pretraining
    return next((record for record in results["cells"] if key(record) == wanted), None)


def run_cells(task: Task, cells: list[Cell], jobs: int, results: dict[str, Any], output: Path) -> int:
    """Run cells in parallel, record each when it ends, and return the number of failures."""
    started, failed = time.perf_counter(), 0
    # SIGTERM, which schedulers send, ends the sweep like Ctrl-C: otherwise its workers would be left behind.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    context = multiprocessing.get_context("spawn")
    ending = context.Event()
    pool = ProcessPoolExecutor(
        min(jobs, len(cells)), mp_context=context, initializer=initialise_worker, initargs=(ending,)
    )
    try:
        futures: dict[Future[dict[str, Any]], Cell] = {
            pool.submit(run_cell, task, cell): cell for cell in cells
        }
        for done, future in enumerate(as_completed(futures), 1):
            cell = futures[future]
            name = f"{cell.kernel} x{cell.distill_weight:g}, seed {cell.seed}"
            if cell.pretraining:
                name += f", pre-training {cell.pretraining}"
            left = (time.perf_counter() - started) / done * (len(cells) - done)
            try:
                record = future.result()
            except (ValueError, RuntimeError, ArithmeticError, OSError) as error:
                failed += 1
                print(f"[{done}/{len(cells)}] {name}: failed: {error}", file=sys.stderr, flush=True)
                continue
            about = {
                "kernel": cell.kernel,
                "distill_weight": cell.distill_weight,
                "pretraining": cell.pretraining,
            }
            # The experiment of a cell knows one pre-training, its first.
            results["cells"].append({**record, **about})
            write_json(results, output / "results.json")
            print(
                f"[{done}/{len(cells)}] {name}: "
                + "".join(f"{name} {record[key]:.1f}, " for key, (name, _) in list(task.figures.items())[:2])
                + f"about {left / 60:.0f} min left",
                flush=True,
            )
    except (KeyboardInterrupt, Terminated):  # a signal to the whole process group may end a cell first
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `timeout` sends a second one at once
        ending.set()
        for process in list(pool._processes.values()):
            process.terminate()
        print(f"\ninterrupted; the same command with --output {output} continues this run", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
    return failed


_ending: Event
"""Set in the workers when the sweep ends."""


def initialise_worker(ending: Event) -> None:
    """Use one thread, and ignore Ctrl-C, which the sweep handles."""
    global _ending
    _ending = ending
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def run_cell(task: Task, cell: Cell) -> dict[str, Any]:
    """Run a cell in a worker, but not after the end of the sweep: the pool hands out cells ahead of time.

    Raises:
        Terminated: If the sweep has ended.
    """
    if _ending.is_set():
        raise Terminated("the sweep has ended")
    return task.run(cell)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
