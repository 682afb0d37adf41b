"""Count optimizer steps from a hook of the optimizer, for `WMATeacher.attach`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

__all__ = ["Attachment"]


class Attachment:
    """The handle that `WMATeacher.attach` returns.

    It is also a context manager, which stops counting at the end of its block.

    Attributes:
        optimizer: The optimizer whose steps count.
    """

    def __init__(self, optimizer: Optimizer, parameters: Iterable[Tensor], advance: Callable[[], None]):
        """Call `advance` after each step that the optimizer takes.

        Args:
            optimizer: The optimizer whose steps count.
            parameters: The student's parameters.
            advance: The function that counts a step.

        Raises:
            TypeError: If `optimizer` is not a single optimizer, or runs no hooks.
            ValueError: If it trains none of `parameters`.
        """
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}: if "
                "several optimizers train the student, attach the teacher to the one whose steps count"
            )
        inner = getattr(optimizer, "optimizer", None)
        if not _runs_hooks(optimizer) and isinstance(inner, Optimizer):
            optimizer = inner  # Accelerate wraps the optimizer without running its hooks
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
        """Whether steps are still counted."""
        return self._handle is not None

    def remove(self) -> None:
        """Stop counting; from here on, call `WMATeacher.update` again."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # A GradScaler does not call step() on overflow, except for fused optimizers: these skip the step in
        # their CUDA kernel, and only this tensor of the scaler says so. Reading it waits for the device.
        overflow = getattr(optimizer, "found_inf", None)
        if overflow is None or not overflow.item():
            self._advance()


def _runs_hooks(optimizer: Optimizer) -> bool:
    return getattr(type(optimizer).step, "hooked", False)


def __dir__() -> list[str]:
    return __all__
