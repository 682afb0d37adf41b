"""The settings of a framework's teacher, saving it in checkpoints, and continuing a run from one.

Where a function has an argument `warn`, it is the framework's function for warnings: it gets the message.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from wmateacher import WMATeacher, checks, kernels

__all__ = [
    "Weights",
    "check",
    "extend",
    "is_sharded",
    "restore",
    "saved_state",
    "start_late",
    "warn_if_short",
]

Weights = Literal["student", "teacher"]
Warn = Callable[[str], Any]

_OPTIONS = [p.name for p in inspect.signature(WMATeacher).parameters.values() if p.kind is p.KEYWORD_ONLY]

# The steps of the run that a teacher does not count, because it started late.
_UNCOUNTED: MutableMapping[WMATeacher, int] = WeakKeyDictionary()


def check(kernel: kernels.KernelLike, total_steps: int | None, options: Iterable[str]) -> None:
    """Check settings of a teacher that is not built yet.

    Args:
        kernel: The kernel, as for `WMATeacher`.
        total_steps: The horizon; None if it is not known yet.
        options: The names of further options of `WMATeacher`.

    Raises:
        ValueError: If a number is out of range, or the kernel or an option is unknown.
        TypeError: If no kernel can be built from `kernel`.
    """
    for option in options:
        checks.one_of("option of TeacherCallback", option, _OPTIONS)
    if total_steps is not None:
        checks.positive_int("total_steps", total_steps)
    kernels.build(kernel)


def is_sharded(teacher: WMATeacher) -> bool:
    """Return whether the average is spread over processes by `fully_shard`."""
    return any(isinstance(p, DTensor) for p in teacher.parameters())


def saved_state(teacher: WMATeacher) -> dict[str, Any]:
    """Return the teacher's state in whole tensors; a collective if the teacher is sharded."""
    state = {key: _whole(value) for key, value in teacher.state_dict().items()}
    return {
        "total_steps": teacher.total_steps, "uncounted": _UNCOUNTED.get(teacher, 0), "teacher": state
    }  # fmt: skip


def restore(teacher: WMATeacher, state: Mapping[str, Any], total_steps: int | None, warn: Warn) -> None:
    """Load a state that `saved_state` returned; warn if the horizon has changed.

    Args:
        teacher: A teacher with the same options, of a student with the same architecture.
        state: The saved state.
        total_steps: The horizon of the continued run, in optimizer steps from its beginning; None to keep
            the saved one.
        warn: See above.

    Raises:
        ValueError: If the state is of another kernel, interval or architecture, or is past `total_steps`.
    """
    saved = state["total_steps"]
    if saved is not None and saved != teacher.total_steps:
        teacher.set_total_steps(saved)
    own = teacher.state_dict()
    teacher.load_state_dict({key: _like(value, own.get(key)) for key, value in state["teacher"].items()})
    _UNCOUNTED[teacher] = state.get("uncounted", 0)
    extend(teacher, total_steps, warn)


def extend(teacher: WMATeacher, total_steps: int | None, warn: Warn) -> None:
    """Set the horizon to that of a run of `total_steps`; warn if it was another. None keeps it."""
    before, uncounted = teacher.total_steps, _UNCOUNTED.get(teacher, 0)
    if total_steps is not None and total_steps - uncounted != before:
        teacher.set_total_steps(total_steps - uncounted)
        began = None if before is None else before + uncounted
        warn(f"the run is now {total_steps} steps long, the teacher began with {began}")


def start_late(teacher: WMATeacher, step: int, total_steps: int | None, missing: str, warn: Warn) -> None:
    """Start the average in a continued run whose checkpoint has no teacher, over the remaining steps.

    A kernel with a `start_step` that is still to come starts there. If it has passed, the present step takes
    its place.

    Args:
        teacher: A teacher that has counted no step.
        step: The optimizer step at which the run continues.
        total_steps: The horizon of the continued run, in optimizer steps from its beginning; None to keep
            the teacher's.
        missing: The missing part of the checkpoint, with which the warning begins.
        warn: See above.

    Raises:
        ValueError: If `step` is past `total_steps`.
    """
    if total_steps is not None and step > total_steps:
        raise ValueError(
            f"total_steps={total_steps} ends before step {step}, at which the run continues: pass the "
            "steps of the whole run, counted from its beginning, also if its checkpoint has no teacher"
        )
    message = f"{missing}: the teacher starts here, from the student as it is"
    counted = min(step, getattr(teacher.kernel, "start_step", 0))
    if total_steps is not None:
        left = max(1, total_steps - step)
        message += f", over the {left} steps that are left"
        teacher.set_total_steps(counted + left)
        _UNCOUNTED[teacher] = step - counted
    warn(message)
    teacher.load_average(None, counted)


def warn_if_short(teacher: WMATeacher, warn: Warn) -> None:
    """Warn if a finished run had clearly fewer steps than its horizon."""
    step, total = teacher.step, teacher.total_steps
    # A gradient scaler skips a few steps of any run, so a tenth may be missing.
    if total is not None and step < 0.9 * total:
        warn(
            f"the teacher counted {step} optimizer steps of a horizon of {total}: its weights are those of "
            f"an unfinished run; pass total_steps={step}"
        )


def _whole(value: Any) -> Any:
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def _like(value: Any, own: Any) -> Any:
    """Return a whole tensor sharded like its counterpart in the teacher."""
    if not isinstance(own, DTensor) or not isinstance(value, Tensor):
        return value
    device = torch.device(own.device_mesh.device_type)
    return distribute_tensor(value.to(device), own.device_mesh, own.placements)
