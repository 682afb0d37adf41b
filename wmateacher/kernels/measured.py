"""The kernel whose weights are measured during the run; `wmateacher.controller` does that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from wmateacher import checks
from wmateacher.kernels.base import Kernel
from wmateacher.kernels.registry import register
from wmateacher.kernels.weights import Array

__all__ = ["Gap"]


def __dir__() -> list[str]:
    return __all__


@register("gap")
@dataclass(frozen=True)
class Gap(Kernel):
    """The kernel of a teacher that keeps its distance, written `gap(0.5)`.

    The average M follows the student W at a share of the distance that W has covered since the start: each
    snapshot moves M just so far that |M - W| is at most `share` |W - W^0|. With D = |M - W| before it,

        omega = max(0, 1 - share |W - W^0| / D).

    The distances are Euclidean, over all parameters that the teacher averages. The weights follow from the
    run, so that there is no profile and no horizon: `WMATeacher.trajectory_weights` returns those of a run
    so far. On a straight way from W^0, M = share W^0 + (1 - share) W at every step, whatever the learning
    rate. At a constant speed these are the weights of `power` with `exponent = 1 / share - 2` (exactly
    `uniform` for 1/2, in the limit else). See the theory page.

    The teacher holds a copy of W^0 in the student's dtype, also in its state.

    Args:
        share: The share in (0, 1]. 1 is a static teacher; small values follow the student closely.
    """

    stepwise: ClassVar[bool] = True

    share: float

    def __post_init__(self) -> None:
        rule = "a share of the student's distance from its start, in (0, 1]"
        self._set(share=checks.number("gap", "share", self.share, lambda x: 0 < x <= 1, rule))

    @property
    def needs_horizon(self) -> bool:  # noqa: D102
        return False

    def omega(self, apart: Any, moved: Any) -> Any:
        """Return the weight of a snapshot.

        Args:
            apart: The distance |M - W| before the snapshot, a number or a tensor; not 0.
            moved: The distance |W - W^0|, in the same form.
        """
        above = 1.0 - self.share * moved / apart
        return (above + abs(above)) / 2.0  # max(0, above), also of a tensor; NaN stays NaN

    def retention(self, steps: NDArray[np.int64], total_steps: int | None) -> Array:
        """Return 0 for step 0. No later step has a retention before the run.

        Raises:
            ValueError: If another step is asked for.
        """
        if np.any(steps > 0):
            raise ValueError(
                f"kernel {str(self)!r} has no weights before the run, which it measures: read "
                "teacher.trajectory_weights() in or after it, or use a kernel that is the same for every "
                f"run, such as 'power(exponent={round(1 / self.share - 2, 2):g})'"
            )
        return np.zeros(steps.shape)
