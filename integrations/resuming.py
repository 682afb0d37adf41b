"""A teacher's state as a framework's checkpoint holds it, and the run that goes on from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from wmateacher import WMATeacher


def sharded(teacher: WMATeacher) -> bool:
    """Whether the average is spread over processes by `fully_shard`."""
    return any(isinstance(p, DTensor) for p in teacher.parameters())


def saved(teacher: WMATeacher) -> dict[str, Any]:
    """Weights, in whole tensors, and clock; a collective where the teacher is sharded."""
    state = {key: _whole(value) for key, value in teacher.state_dict().items()}
    return {"total_steps": teacher.total_steps, "teacher": state}


def take_over(teacher: WMATeacher, state: Mapping[str, Any], total_steps: int | None) -> str | None:
    """Go on from what `saved` gave, over a run of `total_steps`.

    Args:
        teacher: Built as the saved one was, on a student of the same architecture.
        state: What to go on from.
        total_steps: Of the whole run as it is now; None: as it was.

    Returns:
        What to tell the user, where the horizon has changed.

    Raises:
        ValueError: Another kernel, interval or architecture wrote it; or it is past `total_steps`.
    """
    before = state["total_steps"]
    if before is not None and before != teacher.total_steps:
        teacher.set_total_steps(before)
    own = teacher.state_dict()
    teacher.load_state_dict({key: _like(value, own.get(key)) for key, value in state["teacher"].items()})
    return extend(teacher, total_steps)


def extend(teacher: WMATeacher, total_steps: int | None) -> str | None:
    """Let the horizon be `total_steps`, if it is not; what to tell the user then."""
    before = teacher.total_steps
    if total_steps is None or total_steps == before:
        return None
    teacher.set_total_steps(total_steps)
    return f"the run is now {total_steps} steps long, the teacher began with {before}"


def shortened(teacher: WMATeacher) -> str | None:
    """What to tell the user where a finished run had less than nine tenths of the steps it was to have.

    A gradient scaler skips a few.
    """
    step, total = teacher.step, teacher.total_steps
    if total is None or step >= 0.9 * total:
        return None
    return (
        f"the teacher counted {step} optimizer steps of a horizon of {total}: its weights are those of an "
        f"unfinished run; pass total_steps={step}"
    )


def _whole(value: Any) -> Any:
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def _like(value: Any, own: Any) -> Any:
    """A whole tensor sharded as its counterpart is."""
    if not isinstance(own, DTensor) or not isinstance(value, Tensor):
        return value
    device = torch.device(own.device_mesh.device_type)
    return distribute_tensor(value.to(device), own.device_mesh, own.placements)
