"""Means over the tokens of a batch, of losses between logits `[..., C]`, in memory that does not grow with it.

The logits of all tokens at a vocabulary of 100,000 are the largest tensors of a language model's training, and a
loss written with torch's functions holds several of them in float32. Here the loss is computed for some
rows at a time, and so is its gradient, backward, from the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from wmateacher import checks
from wmateacher.losses.divergences import Divergence
from wmateacher.losses.numerics import working_dtype

__all__ = ["token_mask", "token_mean"]

# Elements of the logits that are worked on at a time.
_CHUNK = {"cpu": 2**18}
_CHUNK_ON_ACCELERATORS = 2**25


def __dir__() -> list[str]:
    return __all__


def token_mask(labels: Tensor, *, causal: bool = True, ignore_index: int = -100) -> Tensor:
    """Return which positions of the logits predict a token that counts, as `mask=` of a criterion.

    Example:
        >>> token_mask(torch.tensor([[-100, -100, 5, 7]])).tolist()
        [[False, True, True, False]]

    Args:
        labels: The labels, integers `[..., S]`, with `ignore_index` at prompt and padding tokens. They are those
            that the model takes, not shifted by the caller.
        causal: Whether position i predicts label i + 1, as in decoder-only models. The last position then never
            counts. False if position i predicts label i, as in masked, encoder-decoder and token
            classification models.
        ignore_index: The label of tokens that do not count.

    Returns:
        Boolean tensor of the labels' shape.

    Raises:
        TypeError: If the labels are not a tensor of integers.
        ValueError: If the labels are 0-d.
    """
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        found = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be a tensor of integers [..., S], got {found}; give the model's labels")
    if labels.ndim == 0:
        raise ValueError("labels must be a tensor of integers [..., S], got a 0-d tensor; add the sequence")
    counts = labels != ignore_index
    if causal:
        counts = torch.nn.functional.pad(counts[..., 1:], (0, 1), value=False)
    return counts


def token_mean(
    divergence: Divergence,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    num_items: float | Tensor | None = None,
) -> Tensor:
    """Return the sum of a divergence over the positions that count, divided by their number.

    Args:
        divergence: The loss of a row.
        student: The student's logits, shape `[..., C]`.
        teacher: The teacher's logits, same shape; they receive no gradient.
        mask: Which positions count, a boolean tensor `[...]` or one of 0 and 1; None for all. What the logits
            of the others are changes nothing, not even if they are NaN.
        num_items: The divisor, a number or a 0-d tensor: how many positions count in all the batches that make
            one step. None for the number in this batch; without any, the loss is then 0.

    Returns:
        0-d tensor in float32, or float64 if one of the inputs is.

    Raises:
        TypeError: If `mask` or `num_items` is of another kind.
        ValueError: If the mask's shape is not that of the positions or it has other values than 0 and 1, or
            `num_items` is not above 0.
    """
    where = None if mask is None else _checked_mask(mask, student)
    count: float | Tensor
    if num_items is not None:
        count = _checked_count(num_items)
    elif where is None:
        count = student[..., 0].numel()
    else:
        count = where.sum().clamp(min=1)
    return _TokenSum.apply(student, teacher, where, divergence) / count


def _checked_mask(mask: Any, student: Tensor) -> Tensor:
    if not isinstance(mask, Tensor):
        raise TypeError(
            f"mask must be a boolean tensor [...] for logits [..., C], got {type(mask).__name__}; "
            "write torch.as_tensor(mask)"
        )
    if mask.shape != student.shape[:-1]:
        raise ValueError(
            f"mask must have the logits' shape without the last dimension, {list(student.shape[:-1])}, got "
            f"{list(mask.shape)}; give one value for each position of the logits"
        )
    if mask.dtype != torch.bool:
        # Reading the answer makes the host wait for an accelerator; a boolean mask needs no check.
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError(
                "mask must be boolean, or 0 and 1 alone, got other values; a mask says which positions count. "
                "Write token_mask(labels) for labels with -100"
            )
        mask = mask == 1
    return mask.to(student.device)


def _checked_count(num_items: Any) -> float | Tensor:
    if isinstance(num_items, Tensor):
        if num_items.ndim != 0:
            raise ValueError(
                f"num_items must be a number or a 0-d tensor, got shape {list(num_items.shape)}; give the number "
                "of positions that count in all batches of the step"
            )
        return num_items.detach()
    return checks.positive("a logits loss", "num_items", num_items)


class _TokenSum(torch.autograd.Function):
    """The sum of a divergence over the rows that count."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, mask: Tensor | None, divergence: Divergence
    ) -> Tensor:
        ctx.save_for_backward(student, teacher, mask)
        ctx.divergence = divergence
        values = [divergence.value(*rows) for _, *rows in _chunks(student, teacher, mask)]
        if not values:
            return student.new_zeros((), dtype=working_dtype(student, teacher))
        each = torch.cat(values)
        if mask is not None and each.shape == (mask.numel(),):
            each = each.masked_fill(~mask.flatten(), 0.0)
        return each.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor, None, None, None]:
        student, teacher, mask = ctx.saved_tensors
        gradient = torch.zeros_like(student, memory_format=torch.contiguous_format)
        flat = gradient.view(-1, student.shape[-1])
        for positions, *rows in _chunks(student, teacher, mask):
            part = ctx.divergence.gradient(*rows).mul_(output_gradient)
            if mask is not None:
                part.masked_fill_(~mask.flatten()[positions][:, None], 0.0)
            flat[positions] = part.to(student.dtype)
        return gradient, None, None, None


def _chunks(
    student: Tensor, teacher: Tensor, mask: Tensor | None
) -> Iterator[tuple[slice | Tensor, Tensor, Tensor]]:
    """Yield positions, and the rows of student and teacher there, in the working precision.

    On a CPU, positions that do not count are left out before anything is computed. An accelerator would have to
    tell the host how many there are, which then waits; there they are computed with the others.
    """
    width, dtype = student.shape[-1], working_dtype(student, teacher)
    size = max(1, _CHUNK.get(student.device.type, _CHUNK_ON_ACCELERATORS) // width)
    flat = [t.reshape(-1, width) for t in (student, teacher)]
    if mask is not None and student.device.type == "cpu":
        for index in mask.flatten().nonzero()[:, 0].split(size):
            if len(index):
                yield index, *(t[index].to(dtype) for t in flat)
        return
    for start in range(0, len(flat[0]), size):
        rows = slice(start, start + size)
        yield rows, *(t[rows].to(dtype) for t in flat)
