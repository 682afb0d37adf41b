"""Counting a step after each `optimizer.step()`, from the optimizer's own hook."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class Attachment:
    """What `WMATeacher.attach` returns; also a context manager that removes itself at the end.

    Attributes:
        optimizer: The optimizer whose steps count.
    """

    def __init__(self, optimizer: Optimizer, parameters: Iterable[Tensor], advance: Callable[[], None]):
        """Have `advance` called after each step that the optimizer takes.

        Raises:
            TypeError: `optimizer` is not one optimizer.
            ValueError: It trains none of `parameters`.
        """
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}: of several "
                "optimizers, name the one whose steps count"
            )
        inner = getattr(optimizer, "optimizer", None)
        if not _runs_hooks(optimizer) and isinstance(inner, Optimizer):
            optimizer = inner  # Accelerate's, which steps it
        if not _runs_hooks(optimizer):
            raise TypeError(
                f"the steps of this {type(optimizer).__name__} cannot be counted: it wraps another optimizer "
                "and runs no hooks; call update() after each of its steps"
            )
        ours = {id(p) for p in parameters}
        if not any(id(p) in ours for group in optimizer.param_groups for p in group["params"]):
            raise ValueError(
                f"this {type(optimizer).__name__} trains none of the student's parameters: attach the "
                "teacher to the optimizer that trains the student it was built from"
            )
        self.optimizer = optimizer
        self._advance = advance
        self._handle: RemovableHandle | None = optimizer.register_step_post_hook(self._after_step)

    @property
    def active(self) -> bool:
        """Whether it still counts."""
        return self._handle is not None

    def remove(self) -> None:
        """Stop counting; `WMATeacher.update` is the caller's again."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # Fused optimizers skip an overflowing step inside their kernel: only this tensor of the
        # GradScaler's tells, so that reading it waits for the device. Others are not stepped at all.
        overflow = getattr(optimizer, "found_inf", None)
        if overflow is None or not overflow.item():
            self._advance()


def _runs_hooks(optimizer: Optimizer) -> bool:
    return getattr(type(optimizer).step, "hooked", False)
