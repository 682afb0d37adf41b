"""The numerics that several losses share: the working precision, labels on the diagonal, Sinkhorn-Knopp."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "diagonal_cross_entropy",
    "first_tensor",
    "full_precision",
    "sinkhorn_knopp",
    "upcast",
    "working_dtype",
]


def __dir__() -> list[str]:
    return __all__


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype to compute in: float64 if one of the tensors has it, else float32."""
    return reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)


def upcast(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return both tensors in their working dtype."""
    dtype = working_dtype(student, teacher)
    return student.to(dtype), teacher.to(dtype)


def full_precision(value: Any) -> AbstractContextManager[Any]:
    """Return a context without autocast on the device of the tensors in `value`."""
    tensor = first_tensor(value)
    device_type = "cpu" if tensor is None else tensor.device.type
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def first_tensor(value: Any) -> Tensor | None:
    """Return the first tensor in nested tuples, lists and mappings, or None."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return next((t for t in map(first_tensor, value) if t is not None), None)
    return None


def sinkhorn_knopp(
    logits: Tensor, over_rows: Callable[[Tensor], Tensor] | None = None, iterations: int = 3
) -> Tensor:
    """Balance exp(logits) by Sinkhorn-Knopp, so that the batch uses all outputs equally.

    Columns and rows are normalised in turn. The rows come last, so that each is a distribution.

    Args:
        logits: The logits, shape `[..., C]`.
        over_rows: A function from rows `[N, C]` to their log-sum-exp, `[C]`, which in a distributed run
            includes the rows of all ranks. Default: the log-sum-exp of the given rows.
        iterations: The number of times that both are normalised.

    Returns:
        The probabilities, shape `[..., C]`.
    """
    over_rows = over_rows or (lambda rows: rows.logsumexp(0))
    # In the log domain, because exp(logits) overflows for a small temperature.
    flat = logits.reshape(-1, logits.shape[-1])
    masked = flat == -torch.inf
    for _ in range(iterations):
        flat = (flat - over_rows(flat)).masked_fill(masked, -torch.inf)
        flat = flat.log_softmax(-1)
    return flat.exp().reshape(logits.shape)


def diagonal_cross_entropy(logits: Tensor, first: int = 0) -> Tensor:
    """Compute the cross-entropy of logits `[B_r, B]` whose row i has the label `first` + i."""
    return F.cross_entropy(logits, torch.arange(first, first + logits.shape[0], device=logits.device))
