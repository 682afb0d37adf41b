"""A run's folder: what ran, where, and what came out, in files that are whole at any time."""

from __future__ import annotations

import csv
import json
import os
import platform
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


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
