"""Count optimizer steps from hooks of the optimizers, for `WMATeacher.attach`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from wmateacher import zero

__all__ = ["Attachment"]

# The function that torch wraps around every optimizer's `step`: it runs the hooks.
_STEP: CodeType = Optimizer.profile_hook_step(lambda self: None).__code__


class Attachment:
    """The handle that `WMATeacher.attach` returns.

    It is also a context manager, which stops counting at the end of its block.

    Attributes:
        optimizers: The optimizers whose steps count, as they were given.
    """

    def __init__(
        self,
        optimizers: Optimizer | Sequence[Optimizer],
        parameters: Iterable[Tensor],
        advance: Callable[[], None],
    ):
        """Call `advance` after each step that the optimizers take together.

        Args:
            optimizers: One optimizer, or several in the order in which they step.
            parameters: The student's parameters.
            advance: The function that counts a step.

        Raises:
            TypeError: If `optimizers` is not made of optimizers, or one of them runs no hooks.
            ValueError: If there is none, one is given twice, or one trains none of `parameters`.
        """
        self.optimizers = tuple(optimizers) if isinstance(optimizers, list | tuple) else (optimizers,)
        if not self.optimizers or len({id(o) for o in self.optimizers}) < len(self.optimizers):
            raise ValueError(
                f"optimizer must be one or more different optimizers, got {list(self.optimizers)!r}"
            )
        ours = {id(p) for p in parameters}
        # Each optimizer with those that it holds: it may step them, or the loop may do so itself.
        families = [_family(_hooked(optimizer)) for optimizer in self.optimizers]
        for optimizer, *_ in families:
            if not any(id(p) in ours for p in _trained(optimizer)):
                raise ValueError(
                    f"this {type(optimizer).__name__} trains none of the student's parameters: attach the "
                    "teacher to the optimizer that trains the student it was built from"
                )
        self._advance = advance
        self._positions = {id(member): i for i, family in enumerate(families) for member in family}
        self._last: int | None = None  # the position of the latest optimizer in an unfinished round
        self._started = False
        self._handles = [handle for family in families for member in family for handle in self._hook(member)]

    @property
    def active(self) -> bool:
        """Whether steps are still counted."""
        return bool(self._handles)

    def __str__(self) -> str:
        return ", ".join(type(optimizer).__name__ for optimizer in self.optimizers)

    def remove(self) -> None:
        """Stop counting; from here on, call `WMATeacher.update` again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _hook(self, optimizer: Any) -> Sequence[Any]:
        """Have an optimizer report its steps, and return the handles that end it."""
        # A compiled step would compile the update, too, in many pieces that gain nothing.
        before, after = map(torch.compiler.disable, (self._before_step, self._after_step))
        if zero.is_optimizer(optimizer):
            return [zero.StepHooks(optimizer, *(partial(f, optimizer, (), {}) for f in (before, after)))]
        return [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._is_outermost():
            return
        position = self._positions[id(optimizer)]
        if not self._started and position > 0:
            raise RuntimeError(
                f"the teacher is attached to {self} and the first to step is {type(optimizer).__name__}: "
                "pass the optimizers in the order in which they step (or a GradScaler skipped the others in "
                "the first step: lower its init_scale)"
            )
        self._started = True
        # A GradScaler may skip the step of some of the optimizers, whose hooks then do not run. The student
        # is still as the others left it, so the unfinished round is counted here.
        if self._last is not None and position <= self._last:
            self._count()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._is_outermost():
            return
        # A GradScaler does not call step() on overflow, except for fused optimizers: these skip the step in
        # their CUDA kernel, and only this tensor of the scaler says so. Reading it waits for the device.
        overflow = getattr(optimizer, "found_inf", None)
        if overflow is not None and overflow.item():
            return
        self._last = self._positions[id(optimizer)]
        if self._last == len(self.optimizers) - 1:
            self._count()

    def _count(self) -> None:
        self._last = None
        self._advance()

    def _is_outermost(self) -> bool:
        """Whether the step whose hook runs is nobody's inner step.

        A subclass that calls `super().step()` and an optimizer that steps another one run hooks more than
        once. Steps in progress are counted on the stack, because a counter in a pre-hook would be wrong after
        an exception. Torch's distributed checkpoints take a step with zero gradients to create an optimizer's
        state, which counts as nothing.
        """
        states = sys.modules.get("torch.distributed.checkpoint.state_dict")
        initialise = getattr(getattr(states, "_init_optim_state", None), "__code__", None)
        frame, steps = sys._getframe(1), 0
        while frame is not None:
            if frame.f_code is _STEP and id(frame.f_locals["args"][0]) in self._positions:
                steps += 1
            if steps > 1 or frame.f_code is initialise:
                return False
            frame = frame.f_back  # type: ignore[assignment]
        return True


def _hooked(optimizer: Any) -> Any:
    """Return the optimizer whose steps are reported: the one given, or the one in a wrapper without hooks."""
    optimizer = zero.optimizer_of(optimizer)
    if zero.is_optimizer(optimizer):
        return optimizer
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer or a list of them, got {type(optimizer).__name__}"
        )
    inner = getattr(optimizer, "optimizer", None)
    if not _runs_hooks(optimizer) and (isinstance(inner, Optimizer) or zero.is_optimizer(inner)):
        return inner  # Accelerate wraps the optimizer without running its hooks
    if not _runs_hooks(optimizer):
        raise TypeError(
            f"the steps of this {type(optimizer).__name__} cannot be counted: it wraps another optimizer "
            "and runs no hooks; call update() after each of its steps"
        )
    return optimizer


def _trained(optimizer: Any) -> Iterable[Tensor]:
    """Return the parameters that an optimizer steps."""
    if zero.is_optimizer(optimizer):
        return zero.parameters(optimizer)
    return (p for group in optimizer.param_groups for p in group["params"])


def _family(optimizer: Any) -> list[Any]:
    """Return an optimizer and those that it holds, such as the base optimizer of SAM or Lookahead."""
    if zero.is_optimizer(optimizer):
        return [optimizer]  # its base optimizer steps once for each group
    inner = [o for o in vars(optimizer).values() if isinstance(o, Optimizer) and _runs_hooks(o)]
    return [optimizer, *inner]


def _runs_hooks(optimizer: Optimizer) -> bool:
    return getattr(type(optimizer).step, "hooked", False)


def __dir__() -> list[str]:
    return __all__
