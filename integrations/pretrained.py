"""Averages in folders that `from_pretrained` reads: models of transformers, PEFT, diffusers and others."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wmateacher import WMATeacher
from wmateacher.files import File, write_atomically
from wmateacher.integrations import resuming
from wmateacher.kernels import KernelLike

__all__ = ["FILE", "from_pretrained", "read", "save_model", "save_pretrained"]

FILE = "teacher.pt"
"""The name of the teacher's file in a folder: the average at full precision and its clock."""


def save_pretrained(teacher: WMATeacher, folder: File, **options: Any) -> None:
    """Write the average as a model folder, and the teacher's whole state beside it in `teacher.pt`.

    The model's `from_pretrained` reads the folder: the averaged weights in the student's dtype, with the
    configuration. `from_pretrained` of this module also restores the clock and the full precision of the
    average.

    Args:
        teacher: The teacher of a model that has `save_pretrained`.
        folder: The folder, which is created if it is missing.
        **options: Options of the model's `save_pretrained`, such as `max_shard_size`.

    Raises:
        TypeError: If the student has no `save_pretrained`.
        ValueError: If the average is sharded.
        RuntimeError: If called inside `swap`, or while adapters are merged.
    """
    file = Path(folder) / FILE
    state = resuming.saved_state(teacher)
    # An interrupted save must not leave the clock of one average beside the weights of another.
    file.unlink(missing_ok=True)
    save_model(teacher, folder, **options)
    with write_atomically(file) as stream:
        torch.save(state, stream)


def save_model(teacher: WMATeacher, folder: File, **options: Any) -> None:
    """Write the average as a model folder, without the teacher's state; otherwise as `save_pretrained`."""
    model: Any = teacher.module
    if not callable(getattr(model, "save_pretrained", None)):
        raise TypeError(
            f"a {type(model).__name__} has no save_pretrained, as models of transformers, PEFT and "
            "diffusers do: save teacher.averaged_state_dict() or, with the clock, teacher.state_dict()"
        )
    if resuming.is_sharded(teacher):
        raise ValueError(
            "the average is sharded over processes, and a model folder holds whole tensors: gather it with "
            "teacher.averaged_state_dict(full=True), which every rank calls, and write it on rank 0 with "
            "save_pretrained(folder, state_dict=...) of an unsharded model"
        )
    # Reading the state refuses what must not be saved: lent weights and merged adapters.
    teacher.state_dict()
    model.save_pretrained(str(folder), **options)


def from_pretrained(
    folder: File, model: nn.Module | type[Any], kernel: KernelLike | None = None, **options: Any
) -> WMATeacher:
    """Return the teacher that `save_pretrained` wrote, with its average and its clock.

    Examples:
        >>> teacher = from_pretrained("runs/average", UNet2DModel)  # doctest: +SKIP
        >>> teacher.module.save_pretrained("elsewhere")  # doctest: +SKIP

    Args:
        folder: The folder.
        model: The student, to go on training: a model of the same architecture. Or its class, to use the
            average alone: the student is then read from the folder and has the averaged weights, too.
        kernel: The kernel; None for the one in the folder.
        **options: Further options of `WMATeacher`, as for the teacher that was saved. The folder holds
            `update_every`, but not `dtype`, `buffers`, `exclude` and the others.

    Raises:
        FileNotFoundError: If the folder holds no teacher.
        TypeError: If `model` is neither a module nor a class with `from_pretrained`.
        ValueError: If the kernel is not one that its name builds, or the state does not fit the model.
    """
    saved = read(folder)
    clock = saved["teacher"]["_extra_state"]
    if isinstance(model, type) and callable(getattr(model, "from_pretrained", None)):
        model = model.from_pretrained(str(folder))
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module or a class that has from_pretrained, got {model!r}")
    options = {"update_every": clock["update_every"], **options}
    if kernel is None:
        kernel = clock["kernel"]
    teacher = WMATeacher(model, kernel, saved["total_steps"], **options)
    resuming.restore(teacher, saved, None, warnings.warn)
    return teacher


def read(folder: File) -> dict[str, Any]:
    """Return the teacher's saved state in a folder.

    Raises:
        FileNotFoundError: If the folder holds none.
        ValueError: If the file is of something else.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no {FILE} in {str(folder)!r}, and the weights alone have no clock: pass a folder that "
            "save_pretrained or TeacherCallback wrote; to start an average from a model, WMATeacher(model)"
        )
    saved = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(saved, dict) or not {"total_steps", "teacher"} <= saved.keys():
        raise ValueError(f"{str(file)!r} is not a teacher's file: pass a folder that save_pretrained wrote")
    return saved


def __dir__() -> list[str]:
    return __all__
