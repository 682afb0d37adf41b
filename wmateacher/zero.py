"""DeepSpeed: the steps of its engines and optimizers, and what ZeRO keeps beside the model's parameters.

DeepSpeed's optimizers are not torch optimizers. They keep float32 copies of the parameters, the masters. A
torch optimizer inside steps these, under ZeRO one group after the other. The model's own parameters follow at
the end of `step`, so that a hook of the optimizer inside would come too early. DeepSpeed is never imported
here, only used if the user has imported it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from wmateacher import walking

__all__ = ["StepHooks", "is_optimizer", "optimizer_of", "parameters", "refresh_masters", "refuse_partitioned"]

# The parameters that each of DeepSpeed's optimizers updates, in lists.
_GROUPS = ("bit16_groups", "bf16_groups", "fp16_groups")


def optimizer_of(stepper: Any) -> Any:
    """Return the optimizer of a DeepSpeed engine; anything else is returned unchanged.

    Raises:
        ValueError: If the engine was built without an optimizer.
    """
    if not _is_engine(stepper):
        return stepper
    if not hasattr(stepper.optimizer, "step"):
        raise ValueError(
            "this DeepSpeed engine has no optimizer whose steps could be counted: pass optimizer= to "
            "deepspeed.initialize, or call update() after each step"
        )
    return stepper.optimizer


def is_optimizer(optimizer: Any) -> bool:
    """Return whether an optimizer is one of DeepSpeed's own."""
    kind = _loaded("deepspeed.runtime.base_optimizer", "DeepSpeedOptimizer")
    return kind is not None and isinstance(optimizer, kind)


def parameters(optimizer: Any) -> Iterator[Tensor]:
    """Yield the model's parameters that one of DeepSpeed's optimizers trains."""
    for name in _GROUPS:
        for group in getattr(optimizer, name, ()):
            yield from group


class StepHooks:
    """Functions called before and after each `step` of one of DeepSpeed's optimizers, until `remove`."""

    def __init__(self, optimizer: Any, before: Callable[[], None], after: Callable[[], None]):
        """Wrap the optimizer's `step`.

        Args:
            optimizer: The optimizer.
            before: The function to call before each step.
            after: The function to call after each step that was not skipped because of an overflow.
        """
        step = optimizer.step

        @functools.wraps(step)
        def hooked(*args: Any, **kwargs: Any) -> Any:
            if self._removed:
                return step(*args, **kwargs)
            before()
            result = step(*args, **kwargs)
            if not getattr(optimizer, "overflow", False):
                after()
            return result

        self._optimizer, self._step, self._hooked, self._removed = optimizer, step, hooked, False
        optimizer.step = hooked

    def remove(self) -> None:
        """Call the functions no more, and restore the optimizer's `step` if nothing is wrapped around it."""
        # The hooks of a teacher that was attached later hold this wrapper, which then has to stay.
        self._removed = True
        if self._optimizer.step is self._hooked:
            self._optimizer.step = self._step


def refresh_masters(model: nn.Module) -> None:
    """Set the masters to the present values of the parameters, which the next step would undo otherwise.

    Args:
        model: A DeepSpeed engine, or the module in it. Without ZeRO, only the engine leads to the masters.
    """
    optimizer: Any = model.optimizer if _is_engine(model) else None
    if hasattr(optimizer, "refresh_fp32_params"):
        optimizer.refresh_fp32_params()
        return
    for _, parameter in walking.named_parameters(model):
        if getattr(parameter, "_hp_mapping", None) is not None:
            parameter.set_full_hp_param(parameter.detach().float())  # type: ignore[attr-defined]


def refuse_partitioned(tensors: Mapping[str, Tensor]) -> None:
    """Raise a ValueError if ZeRO-3 has partitioned one of a student's tensors, which are then empty."""
    for name, parameter in tensors.items():
        if hasattr(parameter, "ds_id"):
            raise ValueError(
                f"DeepSpeed ZeRO-3 has partitioned the student's {name!r}, so that no rank has its values "
                "outside of a forward pass: use ZeRO-1 or ZeRO-2, or shard the student with FSDP2's "
                "torch.distributed.fsdp.fully_shard and build the teacher with module_factory=FACTORY"
            )


def _is_engine(value: Any) -> bool:
    kind = _loaded("deepspeed.runtime.engine", "DeepSpeedEngine")
    return kind is not None and isinstance(value, kind)


def _loaded(module: str, name: str) -> Any:
    """Return a class if its module has been imported, otherwise None: nothing can be an instance of it."""
    return getattr(sys.modules.get(module), name, None)


def __dir__() -> list[str]:
    return __all__
