"""Measure everything that needs a GPU, within a given time, in sections of decreasing worth.

    python benchmarks/on_gpu.py --minutes 8 --output DIR
    python benchmarks/on_gpu.py --sections update losses --output DIR
    python benchmarks/on_gpu.py --device cpu --quick        # does it run?

Each section is a process with a time limit. What it has measured is in DIR/SECTION.json at once, so that an
error, a hang or a lack of memory loses nothing else. Time that a section leaves goes to the later ones. A
section that needs a package that is not installed is skipped. At the end the tables are printed and written
to DIR/summary.md. Training runs that DIR holds already, of the same recipe, are not repeated.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shlex
import signal
import sys
import time
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT / "benchmarks", ROOT):  # the library need not be installed
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from gpu import record, report  # noqa: E402
from gpu.record import Options  # noqa: E402

from wmateacher.integrations.engine.results import read_json, write_json  # noqa: E402

SHARES = {"correct": 2.5, "update": 1.3, "step": 2.2, "losses": 0.5, "tracer": 2.0, "backbones": 1.3}
"""The sections in order of worth, and their shares of the time."""
GRACE = 5.0
"""Seconds that a section may take longer than it was told, before it is stopped."""
LEAST = 5.0
"""A section that would get fewer seconds is not started."""


def main() -> int:
    """Run the sections and report on them."""
    arguments = parsed()
    commit = arguments.commit or record.commit()
    # Runs of other code must not be resumed.
    folder = commit[:12] if len(commit) == 40 else time.strftime("%Y%m%d-%H%M%S")
    options = Options(
        device=arguments.device, quick=arguments.quick, output=arguments.output,
        scratch=arguments.scratch / folder, command=shlex.join(["python", *sys.argv]), commit=commit,
        date=now(), data_root=arguments.data_root, jobs=arguments.jobs,
    )  # fmt: skip
    end = time.monotonic() + 60 * arguments.minutes
    left = list(arguments.sections)
    while left:
        share = SHARES[left[0]] / sum(SHARES[name] for name in left)
        seconds = share * (end - time.monotonic())
        section = left.pop(0)
        if seconds < LEAST:
            untouched(section, options)
            continue
        print(f"[{section}] {report.TITLES[section]}: {seconds:.0f} s", flush=True)
        state = run(section, options, seconds)
        print(f"[{section}] {state}", flush=True)
    page = report.page(arguments.output, arguments.sections)
    (arguments.output / "summary.md").write_text(page, encoding="utf-8")
    print(f"\n{page}\nwrote {arguments.output}/summary.md and one .json for each section")
    contents = [read_json(arguments.output / f"{name}.json") for name in arguments.sections]
    return int(any(c["errors"] or c["state"] not in ("finished", "skipped") for c in contents))


def parsed() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="the time for everything (default: 8)")
    parser.add_argument("--output", type=Path, default=Path("runs/on-gpu"), help="folder of the results")
    parser.add_argument("--sections", nargs="+", choices=SHARES, default=list(SHARES), metavar="SECTION")
    parser.add_argument("--list", action="store_true", help="list the sections")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu to try the command")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--data-root", type=Path, help="folder that holds MNIST; without it, digits alone")
    parser.add_argument("--jobs", type=int, help="training runs at a time (default: half the cores, up to 8)")
    parser.add_argument("--scratch", type=Path, help="folder of checkpoints (default: runs/on-gpu-scratch)")
    parser.add_argument("--commit", help="the commit that is measured (default: what git says)")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(f"{name:<10} {report.TITLES[name]}" for name in SHARES))
        raise SystemExit
    if not arguments.minutes > 0:
        parser.error(f"--minutes must be above 0, got {arguments.minutes}")
    cores = os.cpu_count() or 1
    arguments.jobs = max(1, min(8, cores // 2)) if arguments.jobs is None else arguments.jobs
    if arguments.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {arguments.jobs}")
    if arguments.device.startswith("cuda") and not _has_gpu():
        parser.error("there is no GPU: pass --device cpu --quick to try the command without one")
    arguments.output = arguments.output.resolve()
    arguments.scratch = (arguments.scratch or Path("runs/on-gpu-scratch")).resolve()
    arguments.output.mkdir(parents=True, exist_ok=True)
    return arguments


def run(section: str, options: Options, seconds: float) -> str:
    """Run a section in a process of its own, and return the state that it ends in."""
    grace = min(GRACE, 0.2 * seconds)
    options = replace(options, deadline=time.monotonic() + seconds - grace, date=now())
    process = multiprocessing.get_context("spawn").Process(target=record.work, args=(section, options))
    process.start()
    limit = time.monotonic() + seconds
    try:
        # In short waits: a longer one would also wait for what a crashed section has left.
        while process.is_alive() and (left := limit - time.monotonic()) > 0:
            process.join(min(left, 0.2))
        stopped = process.is_alive()
    finally:  # also if this process is interrupted, and what a crash has left
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()  # if it has no group of its own yet
        process.join()
    file = options.output / f"{section}.json"
    content = read_json(file) if file.exists() else {}
    if content.get("date") != options.date:  # of an earlier run: this one has not come to write anything
        content = {**_empty(section, options), "state": "running"}
    if content["state"] == "running":
        content["state"] = (
            f"stopped at its limit of {seconds:.0f} s" if stopped else f"ended with code {process.exitcode}"
        )
        write_json(content, file)
    return content["state"]


def untouched(section: str, options: Options) -> None:
    """Leave a section out for lack of time; the results of an earlier run stay."""
    print(f"[{section}] skipped, no time left", flush=True)
    file = options.output / f"{section}.json"
    if not file.exists():
        write_json({**_empty(section, options), "skipped": {section: "no time left"}}, file)


def _empty(section: str, options: Options) -> dict[str, Any]:
    """Return the content of a section that has measured nothing."""
    return {**record.header(section, options), "state": "skipped"}


def now() -> str:
    """Return the time, in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *unused: sys.exit(143))
    sys.exit(main())
