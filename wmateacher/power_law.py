"""The linear world's laws for the kernel `power`, in closed form for any length of the run."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from wmateacher import checks
from wmateacher.kernels import Array, Power

__all__ = ["PowerLaw"]


def __dir__() -> list[str]:
    return __all__


# A sum over steps is added up to this many times (exponent + 2), and continued by an expansion from there.
_ADDED = 200
_LARGEST_EXPONENT = 1e5
"""The largest exponent of a `PowerLaw`, for which 160 MB are added up."""


@dataclass(frozen=True)
class PowerLaw:
    r"""Closed forms for the average with the kernel `power(exponent=p)`, which needs no horizon.

    Every method takes the number t of steps so far, a number or an array, and costs the same for any t. With
    a = p + 1, any number above 0:

    $$\omega_t = 1 - \Big(\frac{t}{t+1}\Big)^a, \quad w_{0|t} = (t+1)^{-a}, \quad
      \text{mean age} = \sum_{k=1}^t \Big(\frac{k}{t+1}\Big)^a \to \frac{t}{a+1}.$$

    In the linear world, the teacher's residual $\prod_{j \le t} (1 - \omega_j / (1 + \lambda))$ tends to
    $K (t+1)^{-a / (1 + \lambda)}$, where K is `residual_factor`. For a = 1, the running mean, it is
    $\Gamma(t + 1 + c) / (\Gamma(1 + c)\, \Gamma(t + 2))$ with $c = \lambda / (1 + \lambda)$.

    Examples:
        >>> law = PowerLaw(exponent=-0.5)
        >>> float(law.start_weight(9_999)), round(float(law.teacher_residual(25_030)), 4)
        (0.01, 0.0717)

    Args:
        exponent: The exponent p of the weights, above -1 and at most 1e5.
        distill_weight: The weight lambda of the distillation loss.
    """

    exponent: float
    distill_weight: float = 0.9

    def __post_init__(self) -> None:
        object.__setattr__(self, "exponent", Power(exponent=self.exponent).gamma)
        if self.exponent > _LARGEST_EXPONENT:
            raise ValueError(
                f"PowerLaw: exponent must be at most {_LARGEST_EXPONENT:g}, got {self.exponent:g}: the "
                "kernel's own profile and summary have no such limit"
            )
        object.__setattr__(self, "distill_weight", checks.distill_weight("PowerLaw", self.distill_weight))

    def omega(self, steps: ArrayLike) -> Array:
        """Return the weight of step t's student in the update at step t, from t = 1 on."""
        return self._omega(_steps(steps, 1))

    def start_weight(self, steps: ArrayLike) -> Array:
        """Return the weight of W^0 in the average after t steps."""
        return (_steps(steps) + 1.0) ** -self._a

    def mean_age(self, steps: ArrayLike) -> Array:
        """Return the mean age of the averaged states after t steps, in steps."""
        t, a = _steps(steps)[..., None], self._a
        k = np.arange(1.0, self._added + 1.0)
        # Powers of k / (t + 1), because those of k overflow.
        added = np.sum(np.where(k <= t, (np.minimum(k, t) / (t + 1.0)) ** a, 0.0), axis=-1)

        def summed(k: Array) -> Array:
            """Return the sum up to k by Euler and Maclaurin, without its constant."""
            terms = k / (a + 1.0) + 0.5 + a / (12.0 * k) - a * (a - 1.0) * (a - 2.0) / (720.0 * k**3)
            return (k / (t + 1.0)) ** a * terms

        rest = summed(np.maximum(t, 1.0)) - summed(np.clip(t, 1.0, self._added))
        return added + rest[..., 0]

    def teacher_residual(self, steps: ArrayLike) -> Array:
        """Return the teacher's bias after t steps, relative to that of the start."""
        return np.exp(self._log_residual(_steps(steps)))

    def student_residual(self, steps: ArrayLike) -> Array:
        """Return the student's bias after t steps, relative to that of the start, from t = 1 on."""
        lam = self.distill_weight
        return lam / (1.0 + lam) * np.exp(self._log_residual(_steps(steps, 1) - 1.0))

    def gap(self, steps: ArrayLike) -> Array:
        """Return the distance of teacher and student after t steps, relative to the start's bias."""
        t = _steps(steps, 1)
        return (1.0 - self._omega(t)) / (1.0 + self.distill_weight) * np.exp(self._log_residual(t - 1.0))

    @property
    def residual_factor(self) -> float:
        r"""The factor K of the teacher's residual in a long run, $K (t+1)^{-a / (1 + \lambda)}$."""
        from scipy.special import digamma, zeta

        first, *others = self._expansion()
        rest = sum(d * zeta(k, self._added + 2.0) for k, d in enumerate(others, 2))
        return float(
            np.exp(self._log_residual(np.float64(self._added)) + rest - first * digamma(self._added + 2.0))
        )

    @property
    def _a(self) -> float:
        return self.exponent + 1.0

    @property
    def _added(self) -> int:
        return math.ceil(_ADDED * (self._a + 1.0))

    def _omega(self, t: Array) -> Array:
        return -np.expm1(-self._a * np.log1p(1.0 / t))

    def _log_residual(self, t: Array) -> Array:
        from scipy.special import digamma, zeta

        share, t = 1.0 / (1.0 + self.distill_weight), t[..., None]
        j = np.arange(1.0, self._added + 1.0)
        with np.errstate(divide="ignore"):  # a large exponent leaves less than 1 - omega can hold: 0
            added = np.sum(np.where(j <= t, np.log1p(-share * self._omega(j)), 0.0), axis=-1)
        # The logarithm at step j is a series in 1 / (j + 1).
        first, last = self._added + 2.0, np.maximum(t[..., 0], self._added) + 2.0
        one, *others = self._expansion()
        rest = one * (digamma(last) - digamma(first))
        return added + rest + sum(d * (zeta(k, first) - zeta(k, last)) for k, d in enumerate(others, 2))

    def _expansion(self) -> list[float]:
        """Return the coefficients of u, u^2, ... in log(1 - share (1 - (1 - u)^a))."""
        g, d = [1.0], [0.0]
        binomial, share = 1.0, 1.0 / (1.0 + self.distill_weight)
        for k in range(1, 6):
            binomial *= -(self._a - k + 1.0) / k
            g.append(share * binomial)
            d.append(g[k] - sum(j * d[j] * g[k - j] for j in range(1, k)) / k)
        return d[1:]


def _steps(value: ArrayLike, least: int = 0) -> Array:
    steps = np.asarray(value, dtype=np.float64)
    if not (np.isfinite(steps) & (steps >= least) & (steps == np.floor(steps))).all():
        raise ValueError(f"steps must be whole numbers of at least {least}, got {value!r}")
    return steps
