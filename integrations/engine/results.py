"""The results of a run, with its configuration and environment, in files that are always whole."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import platform
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from wmateacher.files import write_atomically
from wmateacher.integrations.engine import processes

__all__ = [
    "Results",
    "environment",
    "file_name",
    "flatten",
    "identity",
    "read_json",
    "run_name",
    "write_csv",
    "write_json",
]


def environment(device: torch.device | str, packages: Iterable[str] = ()) -> dict[str, Any]:
    """Return the versions and the hardware, to be kept with the results."""
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
        output: The folder of the run. If it holds results of the same configuration, they are continued.
        config: The configuration: any mapping that JSON can hold.
        where: The environment, from `environment`. An existing file keeps that of its first run.
        neutral: Names of settings, at any depth of `config`, that may differ because they change no result.

    Attributes:
        content: The content of the file: `config`, `environment`, and under `methods` for each name the means
            over seeds, their sample deviations `std`, and the `runs` themselves.

    Raises:
        ValueError: If the folder holds results of another configuration.
    """

    def __init__(self, output: Path, config: Any, where: dict[str, Any], neutral: Sequence[str] = ()):
        self.output, self.file = output, output / "results.json"
        config = json.loads(json.dumps(config))  # so that it compares equal with what is read back
        self.content: dict[str, Any] = {"config": config, "environment": where, "methods": {}}
        if self.file.exists():
            self.content = read_json(self.file)
            there = self.content.get("config", {}) if isinstance(self.content, dict) else {}
            before, now = dict(flatten(there)), dict(flatten(config))
            differing = [
                name
                for name in {**before, **now}
                if name.rpartition(".")[2] not in neutral and before.get(name) != now.get(name)
            ]
            if differing:
                more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
                raise ValueError(
                    f"output folder {output} holds results of another configuration (different: "
                    f"{', '.join(differing[:5])}{more}): choose another folder, or delete it"
                )

    def claim(self) -> None:
        """Write the configuration before anything is trained, so that no other run uses the folder."""
        if processes.is_main() and not self.file.exists():
            write_json(self.content, self.file)

    def withdraw(self) -> None:
        """Delete the file if it records no run and there is no checkpoint to continue from."""
        if processes.is_main() and not self.content["methods"] and not (self.output / "checkpoints").exists():
            self.file.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # of a folder that holds something else
                self.output.rmdir()

    def recorded(self, method: str, seed: int, pretraining: int = 0) -> dict[str, Any] | None:
        """Return the record of one run, or None if it has not finished."""
        all_runs = self.content["methods"].get(method, {}).get("runs", [])
        return next((run for run in all_runs if identity(run) == (pretraining, seed)), None)

    def record(self, method: str, record: dict[str, Any]) -> None:
        """Add the record of one run, with its `seed` and perhaps `pretraining`, and write the file."""
        all_runs = [*self.content["methods"].get(method, {}).get("runs", []), record]
        self.content["methods"][method] = {**_over_seeds(all_runs), "runs": all_runs}
        if processes.is_main():
            write_json(self.content, self.file)


def identity(run: Mapping[str, Any]) -> tuple[int, int]:
    """Return what tells a run from others of its method: the number of its pre-training, and its seed.

    A record without `pretraining` is one of pre-training 0.
    """
    return run.get("pretraining", 0), run["seed"]


def _over_seeds(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean of every number in records of the same form, and under `std` its sample deviation."""
    means: dict[str, Any] = {}
    deviations: dict[str, Any] = {}
    for key, first in records[0].items():
        values = [r[key] for r in records]
        if isinstance(first, dict):
            inner = _over_seeds(values)
            deviations[key] = inner.pop("std")
            means[key] = inner
        elif key not in ("seed", "pretraining"):
            known = [v for v in values if isinstance(v, (int, float))]
            means[key] = statistics.fmean(known) if known else None
            deviations[key] = statistics.stdev(known) if len(known) > 1 else 0.0
    return {**means, "std": deviations}


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the value of everything in nested mappings."""
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def file_name(text: str) -> str:
    """Return a file name for `text` that every file system accepts; different texts give different names."""
    plain = re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")
    return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def run_name(method: str, seed: int, pretraining: int = 0) -> str:
    """Return the name of a run's files: method and seed, and the number of the pre-training if not 0."""
    return file_name(method) + (f"-p{pretraining}" if pretraining else "") + f"-{seed}"


def write_json(content: Any, file: Path) -> None:
    """Write JSON; the file appears complete or not at all."""
    text = json.dumps(content, indent=2) + "\n"
    with write_atomically(file) as stream:
        stream.write(text.encode())


def read_json(file: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: If the file is not JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON ({error}): delete it, or choose another folder") from error


def write_csv(header: Sequence[str], rows: Iterable[Sequence[Any]], file: Path) -> None:
    """Write a table as CSV; the file appears complete or not at all."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *rows])
    with write_atomically(file) as stream:
        stream.write(text.getvalue().encode())


def _processor() -> str:
    """Return the model name of the processor, or its architecture if the name is not known."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
