"""Argument checks. Each returns the checked value or raises an error with the argument, value and fix."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from numbers import Integral, Real
from typing import Any, TypeVar

from torch import Tensor

__all__ = [
    "as_float",
    "distill_weight",
    "floating_tensor",
    "fraction",
    "increasing",
    "last_dimension",
    "lookup",
    "nearest",
    "number",
    "one_of",
    "positive",
    "positive_int",
    "same_batch",
    "same_shape",
    "whole",
    "width",
]

_T = TypeVar("_T")

_LARGEST = 2**53
"""The largest count that float64, in which kernels compute, tells from the next."""

_FIX_SHAPES = "give both the same inputs, and project one where only the widths differ"


# --- names ----------------------------------------------------------------------------------------


def nearest(name: str, options: Iterable[str]) -> str:
    """Return the end of an error about an unknown name: close matches, and all names if they are few."""
    known = sorted(options)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return hint + (f"available: {', '.join(known)}" if len(known) <= 50 else f"{len(known)} are available")


def lookup(kind: str, name: str, registry: Mapping[str, _T], *, also: str = "") -> _T:
    """Return `registry[name]`.

    Args:
        kind: The kind of entry for the error message, such as "kernel", "loss" or "recipe".
        name: The name to look up.
        registry: The entries by name.
        also: Other valid values, in words, to add to the error message.

    Raises:
        ValueError: If the name is unknown; the message lists the nearest names.
    """
    if name not in registry:
        options = nearest(str(name), registry) + (f", {also}" if also else "")
        raise ValueError(f"unknown {kind} {name!r}; {options}")
    return registry[name]


def one_of(kind: str, value: _T, options: Iterable[str]) -> _T:
    """Return `value` if it is one of `options`.

    Raises:
        ValueError: If it is not; the message lists the nearest options.
    """
    options = tuple(options)
    if value not in options:
        raise ValueError(f"unknown {kind} {value!r}; {nearest(str(value), options)}")
    return value


# --- numbers --------------------------------------------------------------------------------------


def positive_int(argument: str, value: Any) -> int:
    """Return `value` as an int of at least 1.

    Raises:
        ValueError: If `value` is not a whole number, is less than 1, or is more than 2^53.
    """
    return whole(argument, value, 1)


def whole(argument: str, value: Any, least: int, *, integral: bool = False) -> int:
    """Return `value` as an int from `least` to 2^53.

    Args:
        argument: The argument's name.
        value: The value that the user passed.
        least: The smallest number.
        integral: Whether floats such as 1e3 are whole numbers, too.

    Raises:
        ValueError: If `value` is not such a whole number.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
        with suppress(TypeError, ValueError):
            if integral and (found := as_float(value)).is_integer():
                number = int(found)
    if number < least or _is_bool(value):
        raise ValueError(f"{argument} must be a whole number of at least {least}, got {value!r}")
    if number > _LARGEST:
        raise ValueError(f"{argument} must be at most 2**53, got {value!r}")
    return number


def number(owner: str, argument: str, value: Any, ok: Callable[[float], bool], rule: str) -> float:
    """Return `value` as a finite float that satisfies `ok`.

    Args:
        owner: The owner of the argument, such as "beta", with which the error message starts.
        argument: The argument's name.
        value: The value that the user passed.
        ok: The condition.
        rule: The condition in words, for the message "{owner}: {argument} must be {rule}, got ...".

    Raises:
        ValueError: If `value` is not a finite number that satisfies `ok`.
    """
    try:
        found = math.nan if _is_bool(value) else as_float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not (math.isfinite(found) and ok(found)):
        raise ValueError(f"{owner}: {argument} must be {rule}, got {value!r}")
    return found


def distill_weight(owner: str, value: Any) -> float:
    """Return the weight of a distillation loss as a finite float of at least 0; see `number`."""
    return number(owner, "distill_weight", value, lambda v: v >= 0, "a finite number of at least 0")


def as_float(value: Any) -> float:
    """Return `float(value)`, and infinity for whole numbers beyond every float."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def increasing(argument: str, values: Sequence[int]) -> list[int]:
    """Return a sequence of optimizer steps as a list of ints.

    Raises:
        ValueError: If `values` is empty or is not an increasing sequence of whole numbers of at least 0.
    """
    try:
        numbers = [int(v) for v in values]
        whole = all(n == v for n, v in zip(numbers, values, strict=True))
    except (TypeError, ValueError):
        numbers, whole = [], False
    if not whole or not numbers or numbers[0] < 0 or not all(map(operator.lt, numbers, numbers[1:])):
        raise ValueError(
            f"{argument} must be rising whole numbers of optimizer steps, from 0 on, got {values!r}"
        )
    return numbers


def positive(loss: str, argument: str, value: Any) -> float:
    """Return `value`, an argument of a loss, as a float above 0.

    Raises:
        ValueError: If `value` is not a finite number above 0.
    """
    if _is_number(value) and 0 < (found := as_float(value)) < math.inf:
        return found
    raise ValueError(f"{loss}: {argument} must be a finite number > 0, got {value!r}")


def fraction(loss: str, argument: str, value: Any) -> float:
    """Return `value`, an argument of a loss, as a float in [0, 1).

    Raises:
        ValueError: If `value` is not a number in [0, 1).
    """
    if _is_number(value) and 0 <= value < 1:
        return float(value)
    raise ValueError(f"{loss}: {argument} must be a number in [0, 1), got {value!r}")


def width(loss: str, argument: str, value: Any) -> int:
    """Return `value`, the size of a loss's inputs, as an int of at least 1.

    Raises:
        ValueError: If `value` is not an integer of at least 1.
    """
    if isinstance(value, int | Integral) and not isinstance(value, bool) and int(value) >= 1:
        return int(value)
    raise ValueError(
        f"{loss}: {argument} must be an integer >= 1, got {value!r}; "
        f"give the size of the last dimension, as in {loss}(512)"
    )


def _is_bool(value: Any) -> bool:
    """Return whether a value is True or False, of numpy or torch as well."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


# --- tensors --------------------------------------------------------------------------------------


def floating_tensor(who: str, value: Any, takes: str) -> Tensor:
    """Return `value` if it is a floating-point tensor that is not empty.

    Args:
        who: The argument's name in the error message, such as "student".
        value: The value that the user passed.
        takes: The kind of tensor that the loss takes, in words.

    Raises:
        TypeError: If `value` is not a tensor or not of a floating-point dtype.
        ValueError: If `value` has no elements.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{who} must be {takes}, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(
            f"{who} must be {takes}, of a floating-point dtype, got {value.dtype}; "
            "class indices are targets of the task loss, not a teacher's output"
        )
    if value.numel() == 0:
        raise ValueError(
            f"{who} must have a batch of at least 1, got shape {list(value.shape)}; "
            "skip the loss for empty batches"
        )
    return value


def same_shape(loss: str, student: Tensor, teacher: Tensor) -> None:
    """Check that two tensors have the same shape.

    Raises:
        ValueError: If the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"{loss} needs student and teacher of equal shape, got student "
            f"{list(student.shape)} and teacher {list(teacher.shape)}; {_FIX_SHAPES}"
        )


def same_batch(loss: str, student: Tensor, teacher: Tensor) -> None:
    """Check that two tensors have the same batch size.

    Raises:
        ValueError: If the first dimensions differ.
    """
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"{loss} needs student and teacher of the same batch, got student "
            f"{list(student.shape)} and teacher {list(teacher.shape)}; {_FIX_SHAPES}"
        )


def last_dimension(loss: str, argument: str, size: int, tensor: Tensor) -> None:
    """Check that a tensor's last dimension is the one that the loss was built for.

    Raises:
        ValueError: If it is not.
    """
    if tensor.shape[-1] != size:
        raise ValueError(
            f"{loss} was built with {argument}={size}, got inputs of shape {list(tensor.shape)}; "
            f"write {loss}({tensor.shape[-1]})"
        )


def __dir__() -> list[str]:
    return __all__
