"""A run's folder: what ran, where, and what came out, in files that are whole at any time."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import platform
import re
import statistics
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from wmateacher.integrations.engine import processes
from wmateacher.integrations.engine.overrides import listed


def environment(device: torch.device | str, packages: Iterable[str] = ()) -> dict[str, Any]:
    """Versions and hardware, for the record beside results."""
    device = torch.device(device)
    versions = {}
    for package in ("wmateacher", "torch", "numpy", "scipy", *packages):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "packages": versions,
    }


class Results:
    """The records of every method and seed of one configuration, kept in `results.json`.

    Args:
        output: The run's folder; one with results of the same configuration is continued.
        config: What was asked for: anything that JSON holds.
        where: As `environment` gives it; that of the first run stays.
        neutral: Dotted names in `config` that may differ: they change no result.

    Attributes:
        content: `config`, `environment`, and under `methods` for each name the means over seeds, their
            sample deviations `std`, and the `runs` themselves.

    Raises:
        ValueError: The folder holds results of another configuration.
    """

    def __init__(self, output: Path, config: Any, where: dict[str, Any], neutral: Sequence[str] = ()):
        self.file = output / "results.json"
        config = json.loads(json.dumps(config))  # so that it compares equal with what is read back
        self.content: dict[str, Any] = {"config": config, "environment": where, "methods": {}}
        if self.file.exists():
            self.content = read_json(self.file)
            there = self.content.get("config", {}) if isinstance(self.content, dict) else {}
            before, now = dict(listed(there)), dict(listed(config))
            differing = [k for k in {**before, **now} if k not in neutral and before.get(k) != now.get(k)]
            if differing:
                more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
                raise ValueError(
                    f"output folder {output} holds results of another configuration (different: "
                    f"{', '.join(differing[:5])}{more}): choose another folder, or delete it"
                )

    def claim(self) -> None:
        """Write the configuration down, before anything is trained, so that no other goes on here."""
        if processes.is_main() and not self.file.exists():
            write_json(self.content, self.file)

    def recorded(self, method: str, seed: int) -> dict[str, Any] | None:
        """The record of one run, if it is there."""
        all_runs = self.content["methods"].get(method, {}).get("runs", [])
        return next((run for run in all_runs if run["seed"] == seed), None)

    def record(self, method: str, record: dict[str, Any]) -> None:
        """Add the record of one run, with its `seed`, and write the file."""
        all_runs = [*self.content["methods"].get(method, {}).get("runs", []), record]
        self.content["methods"][method] = {**_over_seeds(all_runs), "runs": all_runs}
        if processes.is_main():
            write_json(self.content, self.file)


def _over_seeds(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Means, and under `std` sample deviations, of every number in records of equal form."""
    means: dict[str, Any] = {}
    deviations: dict[str, Any] = {}
    for key, first in records[0].items():
        values = [r[key] for r in records]
        if isinstance(first, dict):
            inner = _over_seeds(values)
            deviations[key] = inner.pop("std")
            means[key] = inner
        elif key != "seed":
            known = [v for v in values if isinstance(v, (int, float))]
            means[key] = statistics.fmean(known) if known else None
            deviations[key] = statistics.stdev(known) if len(known) > 1 else 0.0
    return {**means, "std": deviations}


def file_name(text: str) -> str:
    """A name for a file or folder that every file system takes, different for different texts."""
    plain = re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")
    return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def write_json(content: Any, file: Path) -> None:
    """Write JSON so that `file` is either the old content or the new."""
    _replace(file, json.dumps(content, indent=2) + "\n")


def read_json(file: Path) -> Any:
    """Read what `write_json` wrote.

    Raises:
        ValueError: It is not JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON ({error}): delete it, or choose another folder") from error


def write_csv(header: Sequence[str], rows: Iterable[Sequence[Any]], file: Path) -> None:
    """Write a table so that `file` is either the old content or the new."""
    partial = _partial(file)
    with partial.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        writer.writerows(rows)
    os.replace(partial, file)


def _replace(file: Path, text: str) -> None:
    partial = _partial(file)
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)


def _partial(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    return file.with_name(f"{file.name}.partial")


def _processor() -> str:
    """The processor's model name; the architecture where the system does not tell."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
