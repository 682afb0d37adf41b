"""The base class of all kernels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import is_dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from wmateacher import checks, spec
from wmateacher.kernels.weights import Array, Summary, realised_weights, summarise

__all__ = ["Kernel"]


def __dir__() -> list[str]:
    return __all__


class Kernel(ABC):
    """The weighting of the student's states in the average.

    For a kernel that is a density over the run, subclass `Density`. For any other kernel, such as an EMA,
    subclass `Kernel` and implement `retention`. `register` gives the subclass a name for use in strings.
    """

    name: ClassVar[str] = ""

    stepwise: ClassVar[bool] = False
    """Whether `retention` of a few steps costs only these steps. A clock then asks for each step when it is
    due. Otherwise it asks once for all steps of the run, and holds 8 bytes for each."""

    @property
    def needs_horizon(self) -> bool:
        """Whether the weights depend on the total number of steps."""
        return True

    @abstractmethod
    def retention(self, steps: NDArray[np.int64], total_steps: int | None) -> Array:
        """Return the share `r_j` of the average that is kept at each of `steps`.

        Args:
            steps: Optimizer steps in [0, total_steps], an integer array of shape `[n]`.
            total_steps: The horizon T; None is allowed if `needs_horizon` is False.

        Returns:
            A float64 array of shape `[n]` with values in [0, 1]; `r_0` is 0.
        """

    def profile(self, total_steps: int) -> Array:
        """Return the weight of every student state in the average at the end of the run.

        Args:
            total_steps: The horizon T.

        Returns:
            A float64 array of shape `[T + 1]` that sums to 1; entry 0 is the pretrained state `W^0`.
        """
        total_steps = checks.positive_int("total_steps", total_steps)
        return realised_weights(1.0 - self.retention(np.arange(total_steps + 1), total_steps))

    def summary(self, total_steps: int) -> Summary:
        """Describe the kernel over `total_steps` steps in a few numbers."""
        return summarise(str(self), self.profile(total_steps))

    def __str__(self) -> str:
        return str(spec.canonical(self, self.name)) if is_dataclass(self) else self.name

    def _require(self, total_steps: int | None) -> int:
        if total_steps is None:
            raise ValueError(
                f"kernel {str(self)!r} needs total_steps, got None: pass the number of optimizer "
                "steps of the whole run (steps per epoch x epochs), or use a kernel without a "
                "horizon, such as 'ema(0.999)' or 'uniform'"
            )
        return total_steps

    def _since(self, start_step: int, steps: NDArray[np.int64], total_steps: int | None) -> NDArray[np.int64]:
        """Return the steps counted from `start_step`, 0 before it."""
        if total_steps is not None and start_step > total_steps:
            raise ValueError(
                f"kernel {str(self)!r} starts at step {start_step}, after the end of a run of "
                f"total_steps={total_steps}: lower start_step or lengthen the run"
            )
        return np.maximum(steps - start_step, 0)

    def _set(self, **values: Any) -> None:
        """Set fields of a frozen kernel, in its `__post_init__`."""
        for key, value in values.items():
            object.__setattr__(self, key, value)
