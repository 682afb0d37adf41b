"""What the updates of a teacher count as where it is not updated at every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from wmateacher import kernels
from wmateacher.kernels import Array, Kernel

Name = Literal["steps", "once", "published"]


def build(kernel: str, every: int, clock: Name) -> tuple[Kernel, int]:
    """What a teacher takes as its `kernel` and its `update_every`.

    Args:
        kernel: A spec of `wmateacher.kernels.build`.
        every: Optimizer steps n between updates.
        clock: `"steps"`: each update stands for the steps nearest to it, the library's own meaning.
            `"once"`: the retention at its step is applied once an update, as CaRot does with its EMA.
            `"published"`: TRACER's code, which looks the kernel up at the *number of the update* over all
            steps. Its time never passes 1/n, so W^0 keeps the more the rarer the updates are: with
            beta(0.5,0.5) over 25,030 steps 0.3%, 10% and 21% for n = 1, 500 and 2,500.
    """
    built = kernels.build(kernel)
    return (built, every) if clock == "steps" else (OnceAnUpdate(built, every, clock == "published"), 1)


@dataclass(frozen=True)
class OnceAnUpdate(Kernel):
    """A kernel whose retention counts once an update; at the other steps the average stays as it is.

    Updates follow the steps n, 2n, ... and T; those of the published code the steps 1, n + 1, 2n + 1, ...
    and T, because it looks for a multiple of n among indices from 0.

    Attributes:
        kernel: Gives the retentions.
        every: Optimizer steps n between updates.
        counted: Look the kernel up at the number of the update, and not at its step.
    """

    kernel: Kernel
    every: int
    counted: bool

    def retention(self, steps: NDArray[np.int64], total_steps: int | None) -> Array:  # noqa: D102
        horizon = self._require(total_steps)
        since = steps - 1 if self.counted else steps
        updated = (since % self.every == 0) | (steps == horizon) | (steps == 0)
        at = np.where(steps == 0, 0, -(-since // self.every) + 1) if self.counted else steps
        return np.where(updated, self.kernel.retention(at, horizon), 1.0)

    def __str__(self) -> str:
        return f"{'published_clock' if self.counted else 'once_an_update'}({self.kernel},{self.every})"
