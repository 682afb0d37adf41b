"""The files that a `Recorder` writes. Each holds one average and its clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from wmateacher import kernels
from wmateacher.files import File, read_metadata, save
from wmateacher.schedule import Clock

__all__ = ["Header", "read_header", "snapshot_file", "snapshot_files", "step_of", "write_snapshot"]


def __dir__() -> list[str]:
    return __all__


_FORMAT = 2
_READ_FORMATS = (1, 2)  # they differ in the clock's state


@dataclass(frozen=True, eq=False)
class Header:
    """The metadata of a snapshot.

    Attributes:
        clock: The average's clock, from which the exact weight of every student state follows.
        averaged: The names of the tensors that are averaged, rather than copied.
    """

    clock: Clock
    averaged: Sequence[str]


def snapshot_file(folder: Path, kernel: kernels.Power, step: int, suffix: str) -> Path:
    """Return the file for the snapshot of an average; the suffix is `".pt"` or `".safetensors"`."""
    return folder / f"step-{step:09d}-power-{kernel.sigma_rel}{suffix}"


def write_snapshot(
    file: Path, state: Mapping[str, Tensor], clock: Mapping[str, Any], averaged: Sequence[str]
) -> None:
    """Write a snapshot.

    Args:
        file: The file to write.
        state: The tensors of the average by name.
        clock: The state of its clock.
        averaged: The names of the tensors that are averaged, rather than copied.
    """
    save(state, file, {"format": _FORMAT, "clock": clock, "averaged": averaged})


def snapshot_files(folder: Path) -> list[Path]:
    """Return the snapshots in a folder, sorted by step."""
    return sorted(f for f in folder.glob("step-*") if f.suffix in (".pt", ".safetensors"))


def step_of(file: Path) -> int:
    """Return the optimizer step of a snapshot, from the file's name."""
    return int(file.name.split("-")[1])


def read_header(file: File) -> Header:
    """Read a snapshot's header.

    Raises:
        ValueError: If the file is not a snapshot, or was written by another version.
    """
    metadata = read_metadata(file)
    if not isinstance(metadata, dict):
        raise ValueError(
            f"{str(file)!r} is not a recorder's snapshot: it has no clock; average plain checkpoints with "
            "average_checkpoints"
        )
    if metadata.get("format") not in _READ_FORMATS:
        raise ValueError(
            f"{str(file)!r} has format {metadata.get('format')!r}, this version reads formats 1 to {_FORMAT}"
            ": read it with the version of wmateacher that wrote it"
        )
    clock, averaged = metadata.get("clock"), metadata.get("averaged")
    if not isinstance(clock, dict) or not isinstance(averaged, list):
        raise ValueError(f"{str(file)!r} is damaged: its header has no clock or no names; leave it out")
    return Header(Clock.resumed(clock), averaged)
