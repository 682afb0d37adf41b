"""Means of a loss over the tokens that count, in memory that does not grow with the batch.

The logits of all tokens are the largest tensors in the training of a language model, and a loss written with
torch's functions holds several of them in float32. Here a few rows at a time are raised to float32, and
give their part of the loss and of its gradient.

Beside the inputs there is one tensor of all logits, the gradient in the student's dtype, which autograd needs
anyway. All others have `_ON_HOST` elements on a CPU (1 MiB in float32) and `_ON_ACCELERATOR` elsewhere
(32 MiB), or those of one row, if a row is longer. Two to ten of them exist at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wmateacher import checks
from wmateacher.losses.divergences import Divergence
from wmateacher.losses.numerics import working_dtype

__all__ = ["token_mask", "token_mean"]

# Elements of the logits that are worked on at a time: on a CPU few enough for its caches, on
# an accelerator enough to keep it busy while the host starts the next operation.
_ON_HOST, _ON_ACCELERATOR = 2**18, 2**23


def __dir__() -> list[str]:
    return __all__


def token_mask(labels: Tensor, *, causal: bool = True, ignore_index: int = -100) -> Tensor:
    """Return which positions of the logits predict a token that counts, as `mask=` of a criterion.

    Examples:
        >>> token_mask(torch.tensor([[-100, -100, 5, 7]])).tolist()
        [[False, True, True, False]]

    Args:
        labels: The labels, integers `[..., S]`, with `ignore_index` at prompt and padding tokens. They are
            those that the model takes, not shifted by the caller.
        causal: Whether position i predicts label i + 1, as in decoder-only models. The last position then
            never counts. False if position i predicts label i, as in masked, encoder-decoder and token
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
        counts = counts.roll(-1, -1)
        counts[..., -1:] = False
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
        num_items: The divisor, a number or a 0-d tensor: how many positions count in all the batches that
            make one step. None for the number in this batch. If no position of the mask counts, the loss is
            0 whatever the divisor is.

    Returns:
        0-d tensor in float32, or float64 if one of the inputs is.

    Raises:
        TypeError: If `mask` or `num_items` is of another kind.
        ValueError: If the mask's shape is not that of the positions or it has other values than 0 and 1, or
            `num_items` is a number that is not above 0, or not 0-d. (The value of a tensor is not checked,
            for which the host would have to wait for an accelerator.)
    """
    where = None if mask is None else _checked_mask(mask, student)
    count: float | Tensor
    if num_items is not None:
        count = _checked_count(num_items)
        if isinstance(count, Tensor) and where is not None:
            # In a step in which nothing counts, 0 / 0 would be NaN.
            count = torch.where(where.any(), count, 1)
    elif where is None:
        count = student[..., 0].numel()
    else:
        count = where.sum().clamp(min=1)
    if isinstance(count, Tensor):
        count = count.to(working_dtype(student, teacher))  # 1 / count of a whole number would be float32
    return _TokenMean.apply(student, teacher, where, divergence, count)


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
                "mask must be boolean, or 0 and 1 alone, got other values; it says which positions count. "
                "For labels with -100, write token_mask(labels)"
            )
        mask = mask == 1
    return mask.to(student.device)


def _checked_count(num_items: Any) -> float | Tensor:
    if isinstance(num_items, Tensor):
        if num_items.ndim != 0:
            raise ValueError(
                f"num_items must be a number or a 0-d tensor, got shape {list(num_items.shape)}; give the "
                "number of positions that count in all batches of the step"
            )
        return num_items.detach()
    return checks.positive("a logits loss", "num_items", num_items)


class _TokenMean(torch.autograd.Function):
    """The sum of a divergence over the rows that count, divided by a number."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        mask: Tensor | None,
        divergence: Divergence,
        count: float | Tensor,
    ) -> Tensor:
        ctx.save_for_backward(student, teacher, mask)
        ctx.divergence, ctx.count = divergence, count
        # Half precision cannot hold the gradient before it is scaled: a GradScaler's factor comes only
        # backward.
        ctx.is_half = student.dtype != working_dtype(student, teacher)
        ahead = ctx.needs_input_grad[0] and not ctx.is_half
        total, ctx.gradient = _sum(divergence, student, teacher, mask, 1 / count if ahead else None)
        return total / count

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor, None, None, None, None]:
        student, teacher, mask = ctx.saved_tensors
        gradient, ctx.gradient = ctx.gradient, None
        with torch.no_grad():
            if ctx.is_half:
                _, gradient = _sum(ctx.divergence, student, teacher, mask, factor / ctx.count)
            elif gradient is None:  # a second time through the same graph
                _, gradient = _sum(ctx.divergence, student, teacher, mask, 1 / ctx.count)
            # For the value of an accelerator, the host would have to wait.
            if not ctx.is_half and not (_on_host(factor) and factor == 1):
                gradient.mul_(factor)
        if torch.is_grad_enabled():  # create_graph=True
            gradient = _OnceDifferentiable.apply(gradient, student)
        return gradient, None, None, None, None


class _OnceDifferentiable(torch.autograd.Function):
    """The identity of a gradient, which refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, student: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, None]:
        raise RuntimeError(
            "the losses between logits are differentiated once only, and create_graph=True asked for a "
            "second derivative; write the loss with torch's functions, such as torch.nn.functional.kl_div"
        )


@torch.no_grad()
def _sum(
    divergence: Divergence,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    factor: float | Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Return the sum over the rows that count, and its gradient times `factor`; None for no gradient."""
    width, dtype = student.shape[-1], working_dtype(student, teacher)
    # On a CPU, rows that do not count are left out. An accelerator would have to tell the host how many there
    # are, for which the host would wait; there they are computed with the others, and dropped.
    on_host = _on_host(student)
    where = None if mask is None else mask.flatten()
    chosen = where.nonzero()[:, 0] if where is not None and on_host else None
    dropped = ~where if where is not None and not on_host else None
    count = student.numel() // width if chosen is None else len(chosen)
    gradient = None
    if factor is not None:
        empty = torch.empty_like if chosen is None else torch.zeros_like
        gradient = empty(student, memory_format=torch.contiguous_format)
    # One tensor for all: small ones that outlive their chunk would keep its memory from being used again.
    values = student.new_empty(count, dtype=dtype)
    size = max(1, (_ON_HOST if on_host else _ON_ACCELERATOR) // width)
    for start in range(0, count, size):
        rows: slice | Tensor = slice(start, min(start + size, count))
        if chosen is not None:
            rows = chosen[rows]
        value, derivative = divergence(
            _rows(student, rows).to(dtype), _rows(teacher, rows).to(dtype), gradient is not None
        )
        values[start : start + size] = value if dropped is None else value.masked_fill_(dropped[rows], 0.0)
        if gradient is not None and derivative is not None and factor is not None:
            derivative.mul_(factor)
            if dropped is not None:
                derivative.masked_fill_(dropped[rows, None], 0.0)
            gradient.view(-1, width)[rows] = derivative.to(gradient.dtype)
    return values.sum(), gradient


def _on_host(tensor: Tensor) -> bool:
    """Return whether the host may decide by a tensor's values. A compiled graph cannot branch by them."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _rows(logits: Tensor, rows: slice | Tensor) -> Tensor:
    """Return rows of the logits `[..., C]` by their positions in `[N, C]`."""
    leading = logits.shape[:-1]
    if logits.is_contiguous() or logits.ndim < 3:
        return logits.view(-1, logits.shape[-1])[rows] if logits.ndim != 2 else logits[rows]
    # Of a slice such as logits[:, :-1], a view of all rows would be a copy of all.
    if isinstance(rows, slice):
        rows = torch.arange(rows.start, rows.stop, device=logits.device)
    indices = []
    for length in reversed(leading):  # torch.unravel_index would make the host wait for an accelerator
        indices.append(rows % length)
        rows = rows // length
    return logits[tuple(reversed(indices))]
