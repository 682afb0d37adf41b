"""What the updates of a teacher count as where it is not updated at every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from wmateacher import kernels
from wmateacher.kernels import Array, Kernel


def build(kernel: str, update_every: int, clock: Literal["steps", "once", "published"]) -> Kernel:
    """The kernel as a teacher with that clock sees it.

    Args:
        kernel: A spec of `wmateacher.kernels.build`.
        update_every: Optimizer steps n between updates.
        clock: `"steps"`: each update stands for the steps nearest to it, the library's own meaning.
            `"once"`: the retention of its step is applied once an update, as CaRot does with its EMA.
            `"published"`: TRACER's code, which looks the kernel up at the *number of the update* over all
            steps. Its time never passes 1/n, so W^0 keeps the more the rarer the updates are.
    """
    built = kernels.build(kernel)
    return built if clock == "steps" else OnceAnUpdate(built, update_every, clock == "published")


@dataclass(frozen=True)
class OnceAnUpdate(Kernel):
    """A kernel whose retention counts at the steps of an update, and nothing is lost at the others.

    For teachers with the same `update_every`.

    Attributes:
        kernel: Gives the retentions.
        every: Optimizer steps n between updates; one more is at T.
        counted: Look the kernel up at the number of the update, and not at its step.
    """

    kernel: Kernel
    every: int
    counted: bool

    def retention(self, steps: NDArray[np.int64], total_steps: int | None) -> Array:  # noqa: D102
        horizon = self._require(total_steps)
        updated = (steps % self.every == 0) | (steps == horizon)
        at = -(-steps // self.every) if self.counted else steps
        return np.where(updated, self.kernel.retention(at, horizon), 1.0)

    def __str__(self) -> str:
        return f"{'published_clock' if self.counted else 'once_an_update'}({self.kernel},{self.every})"
