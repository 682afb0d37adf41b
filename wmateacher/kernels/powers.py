"""Kernels that weight the states by a power of the step: none, all alike, or more to one side."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from wmateacher import checks
from wmateacher.kernels.base import Kernel
from wmateacher.kernels.registry import register
from wmateacher.kernels.weights import Array

__all__ = ["Power", "Static", "Uniform"]


def __dir__() -> list[str]:
    return __all__


@register("uniform")
@dataclass(frozen=True)
class Uniform(Kernel):
    """The running mean of all states, written `uniform`: `r_j = j / (j + 1)`.

    It equals `beta(1,1)` and needs no horizon. `uniform(start_step=1000)` is stochastic weight averaging
    (Izmailov et al. 2018) from step 1000 on; `tail` starts at a fraction of the run instead.

    Args:
        start_step: The first step whose state is averaged. Until then the teacher is the latest student.
    """

    stepwise: ClassVar[bool] = True

    start_step: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        self._set(start_step=checks.whole("uniform: start_step", self.start_step, 0, integral=True))

    @property
    def needs_horizon(self) -> bool:  # noqa: D102
        return False

    def retention(self, steps: NDArray[np.int64], total_steps: int | None) -> Array:  # noqa: D102
        since = self._since(self.start_step, steps, total_steps)
        return since / (since + 1.0)


@register("power")
@dataclass(frozen=True, kw_only=True)
class Power(Kernel):
    """The power-function average, written `power(sigma_rel=0.1)` or `power(exponent=-0.5)`.

    Weights follow the power gamma of the step: `r_j = (1 - 1/t)^(gamma + 1)` with `t = j + 1` (the post-hoc
    EMA formula of Karras et al. 2024, EDM2, where `W^0` counts as the first state). The profile stretches
    with the run, so no horizon is needed: after `t` steps, the weight of `W^0` is `(t + 1)^-(gamma + 1)`, and
    the mean age of the states tends to `t / (gamma + 2)`.

    Karras et al. give the standard deviation of the profile relative to the length of the run, `sigma_rel`.
    Gamma is then the largest root of `(gamma + 1) = sigma_rel^2 (gamma + 2)^2 (gamma + 3)`, at least 0.
    With `exponent`, gamma may also be negative, so that the average leans on the start of the run. In a long
    run it is the average of `beta(1 + exponent, 1)`, which needs a horizon.

    Examples:
        >>> round(Power(sigma_rel=0.1).gamma, 2)
        6.94
        >>> print(Power(exponent=-0.5))
        power(exponent=-0.5)

    Args:
        sigma_rel: The relative standard deviation, in (0, 1/sqrt(12)]. The largest value is the running mean
            (gamma = 0); small values emphasise the end of the run.
        exponent: Gamma itself, above -1, in place of `sigma_rel`. Values below 0 emphasise the start of the
            run, and 0 is the running mean.
    """

    stepwise: ClassVar[bool] = True

    sigma_rel: float | None = None
    exponent: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if (self.sigma_rel is None) == (self.exponent is None):
            raise ValueError(
                f"power: give either sigma_rel or exponent, got sigma_rel={self.sigma_rel} and "
                f"exponent={self.exponent}; write power(sigma_rel=0.1), or power(exponent=-0.5)"
            )
        if self.sigma_rel is None:
            rule = "above -1 (-0.5 emphasises the start of the run, 0 is the running mean)"
            self._set(exponent=checks.number("power", "exponent", self.exponent, lambda x: x > -1, rule))
            return
        limit = 1 / math.sqrt(12)
        rule = f"in (0, {limit:.4f}] (1/sqrt(12), which is the running mean)"
        checked = checks.number("power", "sigma_rel", self.sigma_rel, lambda x: 0 < x <= limit, rule)
        self._set(sigma_rel=checked)

    @functools.cached_property
    def gamma(self) -> float:
        """The exponent of the profile, `w(t) ~ t^gamma`."""
        if self.exponent is not None:
            return self.exponent
        precision = self.sigma_rel**-2  # type: ignore[operator]
        return float(np.roots([1, 7, 16 - precision, 12 - precision]).real.max())

    @property
    def needs_horizon(self) -> bool:  # noqa: D102
        return False

    def retention(self, steps: NDArray[np.int64], total_steps: int | None) -> Array:  # noqa: D102
        return (steps / (steps + 1.0)) ** (self.gamma + 1.0)


@register("static")
@dataclass(frozen=True)
class Static(Kernel):
    """The kernel of a teacher that stays at `W^0`, written `static`."""

    stepwise: ClassVar[bool] = True

    @property
    def needs_horizon(self) -> bool:  # noqa: D102
        return False

    def retention(self, steps: NDArray[np.int64], total_steps: int | None) -> Array:  # noqa: D102
        return (steps > 0).astype(np.float64)
