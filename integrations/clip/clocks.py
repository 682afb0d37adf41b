"""The steps that an update of a teacher stands for if it is updated every n steps only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from wmateacher import kernels
from wmateacher.kernels import Array, Kernel

__all__ = ["CLOCKS", "Clock", "OnceAnUpdate", "build"]

Clock = Literal["steps", "once", "published"]
CLOCKS: tuple[Clock, ...] = ("steps", "once", "published")


def build(kernel: str, every: int, clock: Clock) -> tuple[Kernel, int]:
    """Return the `kernel` and the `update_every` of a teacher.

    Args:
        kernel: A spec of `wmateacher.kernels.build`.
        every: Optimizer steps n between updates.
        clock: `"steps"` is the library's own meaning: each update stands for the steps nearest to it.
            `"once"` applies the retention at its step once per update, as CaRot does with its EMA: after
            steps 1, n + 1, 2n + 1, ..., but not at the end of the run.
            `"published"` looks the kernel up at the *index of the update* over all steps, as TRACER's code
            does. Its time never passes 1/n, so rarer updates leave more weight on W^0: with beta(0.5,0.5)
            over 25,030 steps 0.3%, 10% and 21% for n = 1, 500 and 2,500.
    """
    built = kernels.build(kernel)
    return (built, every) if clock == "steps" else (OnceAnUpdate(built, every, clock == "published"), 1)


@dataclass(frozen=True)
class OnceAnUpdate(Kernel):
    """A kernel whose retention is applied once per update; at other steps the average stays unchanged.

    Updates follow steps 1, n + 1, 2n + 1, ..., because the published codes look for multiples of n among
    indices from 0. With TRACER's clock there is one more, after step T.

    Attributes:
        kernel: The kernel that gives the retentions.
        every: Optimizer steps n between updates.
        counted: Whether the kernel is looked up at the index of the update instead of its step, and the last
            step is an update.
    """

    kernel: Kernel
    every: int
    counted: bool

    def retention(self, steps: NDArray[np.int64], total_steps: int | None) -> Array:  # noqa: D102
        horizon = self._require(total_steps)
        since = steps - 1
        updated = (since % self.every == 0) | (steps == 0) | (self.counted & (steps == horizon))
        at = np.where(steps == 0, 0, -(-since // self.every) + 1) if self.counted else steps
        return np.where(updated, self.kernel.retention(at, horizon), 1.0)

    def __str__(self) -> str:
        return f"{'published_clock' if self.counted else 'carots_clock'}({self.kernel},{self.every})"
