"""Checks of what a user passes, and the wording of the errors."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from torch import Tensor

_FIX_SHAPES = "give both the same inputs, and project one where only the widths differ"


def positive(loss: str, argument: str, value: Any) -> float:
    """`value` as a float.

    Raises:
        ValueError: It is not a finite number above 0.
    """
    if _is_number(value) and math.isfinite(value) and value > 0:
        return float(value)
    raise ValueError(f"{loss}: {argument} must be a finite number > 0, got {value!r}")


def fraction(loss: str, argument: str, value: Any) -> float:
    """`value` as a float.

    Raises:
        ValueError: It is not in [0, 1).
    """
    if _is_number(value) and 0 <= value < 1:
        return float(value)
    raise ValueError(f"{loss}: {argument} must be a number in [0, 1), got {value!r}")


def width(loss: str, argument: str, value: Any) -> int:
    """`value` as an int.

    Raises:
        ValueError: It is not an integer of at least 1.
    """
    if isinstance(value, int | Integral) and not isinstance(value, bool) and int(value) >= 1:
        return int(value)
    raise ValueError(
        f"{loss}: {argument} must be an integer >= 1, got {value!r}; "
        f"give the size of the last dimension, as in {loss}(512)"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def floating_tensor(who: str, value: Any, takes: str) -> Tensor:
    """`value`, a floating-point tensor that is not empty.

    Args:
        who: The argument's name in the error, such as "student".
        value: What the user passed.
        takes: What the loss takes, in words.

    Raises:
        TypeError: Not a tensor, or not a floating-point one.
        ValueError: A tensor without elements.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{who} must be {takes}, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(
            f"{who} must be {takes}, of a floating-point dtype, got {value.dtype}; "
            "class indices are targets for the task loss, not a teacher's output"
        )
    if value.numel() == 0:
        raise ValueError(
            f"{who} must have a batch of at least 1, got shape {list(value.shape)}; "
            "skip the loss where a batch is empty"
        )
    return value


def same_shape(loss: str, student: Tensor, teacher: Tensor) -> None:
    """Refuse tensors of different shapes.

    Raises:
        ValueError: The shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"{loss} needs student and teacher of equal shape, got student "
            f"{list(student.shape)} and teacher {list(teacher.shape)}; {_FIX_SHAPES}"
        )


def same_batch(loss: str, student: Tensor, teacher: Tensor) -> None:
    """Refuse tensors whose first dimensions differ.

    Raises:
        ValueError: The batch sizes differ.
    """
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"{loss} needs student and teacher of the same batch, got student "
            f"{list(student.shape)} and teacher {list(teacher.shape)}; {_FIX_SHAPES}"
        )


def last_dimension(loss: str, argument: str, size: int, tensor: Tensor) -> None:
    """Refuse a tensor whose last dimension is not the one that the loss was built for.

    Raises:
        ValueError: It is another.
    """
    if tensor.shape[-1] != size:
        raise ValueError(
            f"{loss} was built with {argument}={size}, got inputs of shape {list(tensor.shape)}; "
            f"write {loss}({tensor.shape[-1]})"
        )
