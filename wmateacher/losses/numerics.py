"""The pieces that several losses share: float32 arithmetic and divergences written on log-softmax.

Shapes: [..., C], a distribution over the last dimension; every result is the mean over the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype in which to compute with these: float32, or float64 where one of them is float64."""
    return reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)


def upcast(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both tensors in their working dtype."""
    dtype = working_dtype(student, teacher)
    return student.to(dtype), teacher.to(dtype)


def full_precision(value: Any) -> AbstractContextManager[Any]:
    """A context without autocast for the device on which the tensors in `value` are."""
    tensor = first_tensor(value)
    device_type = "cpu" if tensor is None else tensor.device.type
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor in a nest of tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return next((t for t in map(first_tensor, value) if t is not None), None)
    return None


def cross_entropy(student: Tensor, targets: Tensor) -> Tensor:
    """-sum_c p_c log p_S of targets p, probabilities; mean over the leading dimensions."""
    return -(targets * student.log_softmax(-1)).sum(-1).mean()


def soft_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """`cross_entropy` against p_T = softmax(teacher)."""
    return cross_entropy(student, teacher.softmax(-1))


def sinkhorn_knopp(
    logits: Tensor, over_rows: Callable[[Tensor], Tensor] | None = None, iterations: int = 3
) -> Tensor:
    """exp(logits), rescaled in turn to equal sums of all outputs and to sums of 1 over the outputs.

    In the log domain, so that no logit is too large. The last rescaling makes distributions.

    Args:
        logits: [..., C].
        over_rows: [N, C] to [C], the log of the sum of exponentials over all rows there are; by default
            those given.
        iterations: Of both rescalings.
    """
    over_rows = over_rows or (lambda rows: rows.logsumexp(0))
    flat = logits.reshape(-1, logits.shape[-1])
    for _ in range(iterations):
        flat = flat - over_rows(flat)
        flat = flat.log_softmax(-1)
    return flat.exp().reshape(logits.shape)


def kl_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(p_T || p_S) = sum_c p_T (log p_T - log p_S), mean over the leading dimensions."""
    log_p_teacher = teacher.log_softmax(-1)
    log_ratio = log_p_teacher - student.log_softmax(-1)
    return (log_p_teacher.exp() * log_ratio).sum(-1).mean()


def diagonal_cross_entropy(logits: Tensor, first: int = 0) -> Tensor:
    """Cross-entropy of logits [B_r, B] whose right answers are `first`, `first` + 1, ..., mean over rows."""
    return F.cross_entropy(logits, torch.arange(first, first + logits.shape[0], device=logits.device))
