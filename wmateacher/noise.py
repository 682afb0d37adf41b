r"""The linear world with the noise of SGD: bias and variance of student and teacher.

Along an eigenvector of the task's curvature `C = X X^T` with eigenvalue h, let $x_t$ and $y_t$ be the
student's and the teacher's distance from the task's optimum. A step of SGD with learning rate $\eta_t$ on the
task's loss and on $\frac\lambda2 \|(W - M^{t-1}) X\|^2$, with a gradient that has noise $\xi_t$ of variance
$\sigma^2$, and an update of the teacher are

$$x_t = \big(1 - \eta_t h (1 + \lambda)\big) x_{t-1} + \eta_t \lambda h\, y_{t-1} - \eta_t \xi_t, \qquad
  y_t = (1 - \omega_t) y_{t-1} + \omega_t x_t.$$

Both are linear, so that the means, the variances and the covariance obey a recursion of their own, which
`moments` computes exactly in float64. With $\eta_t = 1 / (h (1 + \lambda))$ and no noise, this is the world
of `wmateacher.theory.predict`, in which each step is solved exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wmateacher import checks, kernels
from wmateacher.kernels import Array, Kernel, KernelLike
from wmateacher.schedule import Clock

__all__ = ["Moments", "moments", "omegas", "reference_run"]


def __dir__() -> list[str]:
    return __all__


_REFERENCE_CURVATURE = (1.0, 0.1, 0.01)


@dataclass(frozen=True, eq=False)
class Moments:
    """Means and variances of student and teacher after the last step, an entry for each eigenvalue.

    Attributes:
        student_bias: The student's mean distance from the task's optimum, with its sign.
        teacher_bias: The teacher's mean distance.
        student_variance: The variance of the student, over the noise of the gradients.
        teacher_variance: The variance of the teacher.
        covariance: The covariance of student and teacher.
    """

    student_bias: Array
    teacher_bias: Array
    student_variance: Array
    teacher_variance: Array
    covariance: Array

    @property
    def student_error(self) -> Array:
        """The student's mean squared distance from the optimum: bias^2 + variance."""
        return self.student_bias**2 + self.student_variance

    @property
    def teacher_error(self) -> Array:
        """The teacher's mean squared distance from the optimum: bias^2 + variance."""
        return self.teacher_bias**2 + self.teacher_variance

    @property
    def squared_gap(self) -> Array:
        """The mean squared distance between teacher and student."""
        variance = self.student_variance + self.teacher_variance - 2.0 * self.covariance
        return (self.teacher_bias - self.student_bias) ** 2 + variance


def moments(
    kernel: KernelLike,
    total_steps: int,
    distill_weight: float = 0.9,
    *,
    learning_rate: float | Sequence[float] | Array,
    curvature: float | Sequence[float] | Array = 1.0,
    noise_variance: float | Sequence[float] | Array = 1.0,
    start: float | Sequence[float] | Array = 1.0,
    update_every: int = 1,
) -> Moments:
    """Return bias and variance of student and teacher after `total_steps` steps of SGD.

    Examples:
        >>> with_teacher = moments("uniform", 2_000, 0.9, learning_rate=0.1)
        >>> alone = moments("uniform", 2_000, 0.0, learning_rate=0.1)
        >>> (with_teacher.student_variance / alone.student_variance).round(2)
        array([0.56])

    Args:
        kernel: The teacher's kernel.
        total_steps: The number of steps T, which is also the kernel's horizon.
        distill_weight: The weight lambda of the distillation loss; 0 for a teacher that only watches.
        learning_rate: The learning rate, a number, or one for each of the T steps.
        curvature: The eigenvalues h of the task's curvature, at least 0.
        noise_variance: The variance of the noise in a gradient, a number, or one for each eigenvalue.
        start: The distance of W^0 from the optimum, a number, or one for each eigenvalue.
        update_every: The number of steps between the teacher's updates.

    Raises:
        ValueError: If the shapes do not fit, a value is negative or not finite, or the run diverges.
    """
    lam = checks.distill_weight("moments", distill_weight)
    weights = omegas(kernels.build(kernel), total_steps, update_every)
    h, sigma2, first = (
        np.atleast_1d(_values(name, value))
        for name, value in (("curvature", curvature), ("noise_variance", noise_variance), ("start", start))
    )
    rates = _values("learning_rate", learning_rate)
    if rates.shape not in ((), (total_steps,)):
        raise ValueError(
            f"learning_rate must be a number or one for each of the total_steps={total_steps} steps, "
            f"got shape {rates.shape}"
        )
    for name, values in (("learning_rate", rates), ("curvature", h), ("noise_variance", sigma2)):
        if values.min() < 0:
            raise ValueError(f"{name} must not be negative, got {values.min():g}")
    try:
        shape = np.broadcast_shapes(h.shape, sigma2.shape, first.shape)
    except ValueError:
        raise ValueError(
            f"curvature {h.shape}, noise_variance {sigma2.shape} and start {first.shape} do not fit "
            "together: pass a number, or one for each eigenvalue"
        ) from None
    course = list(zip(np.broadcast_to(rates, total_steps).tolist(), weights.tolist(), strict=True))
    worlds = np.stack([np.broadcast_to(values, shape) for values in (h, sigma2, first)], axis=-1)
    result = Moments(*np.array([_moments(course, lam, *world) for world in worlds.tolist()]).T)
    if not (np.isfinite(result.student_error) & np.isfinite(result.teacher_error)).all():
        limit = 2.0 / (h.max() * (1.0 + lam))
        raise ValueError(
            f"learning_rate: the run diverges, got {rates.max():g}: stay below 2 / (curvature "
            f"(1 + distill_weight)) = {limit:g}"
        )
    return result


def omegas(kernel: Kernel, total_steps: int, update_every: int = 1) -> Array:
    """Return omega_1..omega_T of a kernel, with 0 for the steps that `update_every` skips."""
    clock = Clock(kernel, total_steps, update_every)
    if clock.update_every == 1:
        return 1.0 - kernel.retention(np.arange(1, total_steps + 1), total_steps)
    return np.array([clock.tick() or 0.0 for _ in range(total_steps)])


def reference_run(kernel: KernelLike, total_steps: int, distill_weight: float = 0.9) -> Moments:
    r"""Return the moments of one run that stands for fine-tuning, to compare kernels by.

    Its task has the eigenvalues 1, 0.1 and 0.01, start and noise are 1 in each direction, and the learning
    rate falls as a cosine from $1 / (1 + \lambda)$ to 0. Only ratios between runs of the same length and
    `distill_weight` have a meaning.

    Args:
        kernel: The teacher's kernel.
        total_steps: The number of steps T.
        distill_weight: The weight lambda of the distillation loss.
    """
    progress = np.arange(checks.positive_int("total_steps", total_steps)) / total_steps
    lam = checks.distill_weight("reference_run", distill_weight)
    rate = (1.0 + np.cos(np.pi * progress)) / (2.0 * (1.0 + lam))
    return moments(kernel, total_steps, distill_weight, learning_rate=rate, curvature=_REFERENCE_CURVATURE)


def _moments(
    course: list[tuple[float, float]], lam: float, h: float, sigma2: float, start: float
) -> tuple[float, float, float, float, float]:
    """Return the five moments for one eigenvalue, after steps with these learning rates and omegas."""
    x = y = start
    xx = xy = yy = 0.0
    for rate, omega in course:
        # x <- a x + b y - rate * noise,  y <- (1 - omega) y + omega x
        b = rate * lam * h
        a, kept = 1.0 - rate * h - b, 1.0 - omega
        x = a * x + b * y
        y = kept * y + omega * x
        between = a * xy + b * yy  # of the new student and the old teacher
        xx = a * (a * xx + b * xy) + b * between + rate * rate * sigma2
        yy = kept * (kept * yy + 2.0 * omega * between) + omega * omega * xx
        xy = kept * between + omega * xx
    return x, y, xx, yy, xy


def _values(name: str, value: Any) -> Array:
    try:
        values = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a number or a sequence of numbers: {error}") from None
    if values.ndim > 1 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"{name} must be a finite number or a sequence of them, got {value!r}")
    return values
