r"""The paper's linear world, in which the bias of every method and the gap of every teacher have a formula.

The source is the theory section of TRACER (Asadollahzadeh et al., ICML 2026).

A linear image encoder `W [d, d_I]` maps image features `X [d_I, n]`; the text features are frozen. The
contrastive task pulls `W X` towards targets `Y`, with the loss $\frac12 \|W X - Y\|_F^2$, and training starts
at `W^0`. Let `P` be the projector onto the span of `X` (the task's subspace), `W*` the task's optimum, and
$\lambda$ the weight of the distillation loss (`distill_weight`) or of the L2 penalty (`penalty`). Then

- fine-tuning by gradient descent ends at $W^0 (I - P) + W^*$;
- fine-tuning with an L2 penalty on the distance from the start ends at
  $(Y X^T + \lambda W^0)(C + \lambda I)^{-1}$ with $C = X X^T$;
- distillation from a static teacher ends at $W^0 (I - \frac{P}{1 + \lambda}) + \frac{W^*}{1 + \lambda}$;
- distillation from an average M, with each step solved exactly, obeys for $E^t = (M^t - W^*) P$

    $$E^t = \Big(1 - \frac{\omega_t}{1 + \lambda}\Big) E^{t-1}, \qquad
    (W^t - W^*) P = \frac{\lambda}{1 + \lambda} E^{t-1}.$$

    The kernel, the horizon and $\lambda$ alone therefore determine how much of the bias towards the start is
    left. `predict` computes it.

These statements are easily misread:

- The L2 penalty also leaves the weights outside the task's subspace exactly where they were. It differs from
  distillation inside the subspace, where it mixes the start and the optimum by the eigenvalues of `C`.
- The bias under a weighted average does not vanish at any finite horizon. For Beta(a, b) it shrinks as
  T^(-a / (1 + lambda)), so that only the early exponent a matters. It vanishes in the limit because the
  omegas sum to infinity.
- An EMA collapses onto its student if its window is short compared with the horizon. A slow EMA does not
  collapse within the run: see `predict("ema(0.999)", 2_000, 0.9)`.
- `persistence_bound` is weak, because the weight of W^0 is small after a long run (0.00285 for Beta(0.5, 0.5)
  after 25,030 steps). It also needs the right direction: the one from W^0 to W^T.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from wmateacher import checks, kernels
from wmateacher.kernels import Array, KernelLike
from wmateacher.noise import Moments, moments, reference_run
from wmateacher.noise import omegas as _omegas
from wmateacher.power_law import PowerLaw
from wmateacher.schedule import Clock
from wmateacher.suggestion import Suggestion, suggest

__all__ = [
    "Distillation",
    "LinearWorld",
    "Moments",
    "PowerLaw",
    "Prediction",
    "Suggestion",
    "contrastive_targets",
    "distil",
    "moments",
    "persistence_bound",
    "predict",
    "projector",
    "reference_run",
    "suggest",
]


def __dir__() -> list[str]:
    return __all__


# Singular values up to this share of the largest count as 0.
_RANK = 1e-10


def contrastive_targets(text_weights: Array, text_features: Array) -> Array:
    r"""Return the targets of the contrastive task for the image embeddings: $Y = W_T^0 X_T (n I - J)$.

    Args:
        text_weights: The frozen text encoder `W_T^0`, shape `[d, d_T]`.
        text_features: The features `X_T` of each image's text, shape `[d_T, n]`.

    Returns:
        float64 `[d, n]`: n times each text's embedding minus the sum of all embeddings.
    """
    weights, features = _matrix("text_weights", text_weights), _matrix("text_features", text_features)
    if weights.shape[1] != features.shape[0]:
        raise ValueError(
            f"text_weights {weights.shape} and text_features {features.shape} cannot be multiplied: "
            "pass [d, d_T] and [d_T, n]"
        )
    embedded = weights @ features
    return embedded.shape[1] * embedded - embedded.sum(axis=1, keepdims=True)


def projector(features: Array) -> Array:
    r"""Return the projector onto the task's subspace, $P = X (X^T X)^+ X^T$.

    Args:
        features: The features `X`, shape `[d_I, n]`, of any rank. Singular values below 1e-10 of the largest
            count as 0.

    Returns:
        float64 `[d_I, d_I]`.
    """
    basis, _, _ = _svd(_matrix("features", features))
    return basis @ basis.T


def _svd(features: Array) -> tuple[Array, Array, Array]:
    """Return the singular vectors and values of X that are not 0: `[d_I, r]`, `[r]`, `[r, n]`."""
    left, values, right = np.linalg.svd(features, full_matrices=False)
    rank = int(np.sum(values > _RANK * values[0]))
    return left[:, :rank], values[:rank], right[:rank]


@dataclass(frozen=True, eq=False)
class LinearWorld:
    """A linear task and the weights at which its training starts.

    Attributes:
        features: The features `X`, shape `[d_I, n]`.
        targets: The targets `Y`, shape `[d, n]`. `contrastive_targets` returns those of the paper.
        start: The weights `W^0`, shape `[d, d_I]`.
    """

    features: Array
    targets: Array
    start: Array

    def __post_init__(self) -> None:
        for name in ("features", "targets", "start"):
            # A read-only copy, so that the cached properties stay valid when the caller's array changes.
            matrix = _matrix(name, getattr(self, name)).copy()
            matrix.flags.writeable = False
            object.__setattr__(self, name, matrix)
        (width, examples), (out, rows), start = self.features.shape, self.targets.shape, self.start.shape
        if rows != examples or start != (out, width):
            raise ValueError(
                f"features {self.features.shape}, targets {self.targets.shape} and start {start} do not fit "
                "together: pass [d_I, n], [d, n] and [d, d_I]"
            )

    @cached_property
    def projector(self) -> Array:
        """The projector P onto the task's subspace, `[d_I, d_I]`."""
        return projector(self.features)

    @cached_property
    def covariance(self) -> Array:
        """The covariance C = X X^T, `[d_I, d_I]`."""
        return self.features @ self.features.T

    @cached_property
    def optimum(self) -> Array:
        """The task's solution of least norm, W* = Y X^T C^+, `[d, d_I]`."""
        return self.targets @ np.linalg.pinv(self.features, rcond=_RANK)

    def task_loss(self, weights: Array) -> float:
        """Return the loss 1/2 |W X - Y|_F^2."""
        return 0.5 * float(np.sum((self._encoder(weights) @ self.features - self.targets) ** 2))

    def residual(self, weights: Array) -> float:
        """Return |(W - W*) P|_F, the distance from the task's optimum inside its subspace."""
        return float(np.linalg.norm((self._encoder(weights) - self.optimum) @ self.projector))

    def finetuned(self) -> Array:
        """Return the weights at which gradient descent on the task ends: W^0 (I - P) + W*."""
        return self.start - self.start @ self.projector + self.optimum

    def l2_sp(self, penalty: float) -> Array:
        """Return the weights at which gradient descent ends with an L2 pull to the start (L2-SP).

        With lambda / 2 |W - W^0|^2 added to the loss, these are (Y X^T + lambda W^0)(C + lambda I)^-1.

        Args:
            penalty: The weight lambda of the pull, above 0.
        """
        lam = checks.number("l2_sp", "penalty", penalty, lambda v: v > 0, "a finite number above 0")
        # The inverse is taken by singular vectors, because with a small lambda C + lambda I is numerically
        # singular outside the subspace.
        left, values, right = _svd(self.features)
        inside = (self.targets @ right.T * values + lam * (self.start @ left)) / (values**2 + lam)
        return self.start - self.start @ self.projector + inside @ left.T

    def static_distillation(self, distill_weight: float) -> Array:
        """Return the weights at which distillation from a static teacher, the start, ends.

        With lambda / 2 |(W - W^0) X|^2 added to the loss, these are
        W^0 (I - P / (1 + lambda)) + W* / (1 + lambda).

        Args:
            distill_weight: The weight lambda of the distillation loss.
        """
        share = 1.0 / (1.0 + checks.distill_weight("static_distillation", distill_weight))
        return self.start - share * (self.start @ self.projector) + share * self.optimum

    def _encoder(self, weights: Array) -> Array:
        if np.shape(weights) != self.start.shape:
            raise ValueError(
                f"weights must have the shape of start, {self.start.shape}, got {np.shape(weights)}"
            )
        return weights


@dataclass(frozen=True, eq=False)
class Distillation:
    """The result of `distil`.

    Attributes:
        student: The student's final weights W^T, `[d, d_I]`.
        teacher: The teacher's final weights M^T, `[d, d_I]`.
        teacher_residual: |(M^t - W*) P| for t = 0..T.
        student_residual: |(W^t - W*) P| for t = 0..T.
        gap: |M^t - W^t| for t = 0..T.
    """

    student: Array
    teacher: Array
    teacher_residual: Array
    student_residual: Array
    gap: Array


def distil(
    world: LinearWorld, kernel: KernelLike, total_steps: int, distill_weight: float, update_every: int = 1
) -> Distillation:
    r"""Train a student against a weighted average of itself, solving each step exactly.

    Step t goes to $W^t = W^{t-1} (I - P) + a M^{t-1} P + W^* / (1 + \lambda)$ with
    $a = \lambda / (1 + \lambda)$. This is the minimum of
    $\frac12 \|W X - Y\|^2 + \frac\lambda2 \|(W - M^{t-1}) X\|^2$ nearest to $W^{t-1}$.

    Args:
        world: The task.
        kernel: The teacher's kernel.
        total_steps: The horizon T.
        distill_weight: The weight lambda of the distillation loss.
        update_every: The number of steps between the teacher's updates.
    """
    lam = checks.distill_weight("distil", distill_weight)
    built = kernels.build(kernel)
    gap = built if isinstance(built, kernels.Gap) else None
    clock = Clock(built if gap is None else kernels.Static(), total_steps, update_every)
    inside, optimum = world.projector, world.optimum
    student, teacher = world.start, world.start
    course = [_distances(world, student, teacher)]
    for _ in range(total_steps):
        student = student - student @ inside + (lam * teacher @ inside + optimum) / (1.0 + lam)
        omega = clock.tick()
        if gap is not None and omega is not None:
            apart, moved = (float(np.linalg.norm(student - other)) for other in (teacher, world.start))
            omega = gap.omega(apart, moved) if apart else 0.0
        omega = omega or 0.0
        teacher = teacher + omega * (student - teacher)
        course.append(_distances(world, student, teacher))
    return Distillation(student, teacher, *np.array(course).T)


def _distances(world: LinearWorld, student: Array, teacher: Array) -> tuple[float, float, float]:
    return world.residual(teacher), world.residual(student), float(np.linalg.norm(teacher - student))


@dataclass(frozen=True)
class Prediction:
    """The bias that a kernel leaves, relative to the start's bias |(W^0 - W*) P|.

    `str` gives a small table.

    Attributes:
        kernel: The kernel as a string.
        total_steps: The horizon T.
        distill_weight: The weight lambda of the distillation loss.
        teacher_residual: The teacher's final bias |(M^T - W*) P|.
        student_residual: The student's final bias |(W^T - W*) P|.
        gap: The final distance |M^T - W^T| between teacher and student.
        start_weight: The weight w_{0|T} of W^0 in the teacher.
    """

    kernel: str
    total_steps: int
    distill_weight: float
    teacher_residual: float
    student_residual: float
    gap: float
    start_weight: float

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{self.kernel} over {self.total_steps} steps, distill_weight = {self.distill_weight:g}",
                f"  bias left, teacher     {self.teacher_residual:.2%}",
                f"  bias left, student     {self.student_residual:.2%}",
                f"  gap at the end         {self.gap:.2%}",
                f"  weight of W^0          {self.start_weight:.3%}",
            ]
        )


def predict(
    kernel: KernelLike, total_steps: int, distill_weight: float = 0.9, update_every: int = 1
) -> Prediction:
    r"""Predict how much of the start's bias a kernel leaves in the linear world, without training.

    The teacher's share is $e_T = \prod_t (1 - \omega_t / (1 + \lambda))$ and the student's is
    $\frac{\lambda}{1 + \lambda} e_{T-1}$. Teacher and student lie on the line from the optimum to the start,
    so the gap is the difference of the two, $\frac{1 - \omega_T}{1 + \lambda} e_{T-1}$.

    The weights of `gap(s)`, which a run measures, are known here, too: with
    $e^* = \frac{s (1 + \lambda)}{1 + \lambda s}$, the share after n updates is
    $e^* + (1 - e^*) \big(\frac{\lambda (1 - s)}{1 + \lambda}\big)^n$. In the limit the student's
    bias is the one under a static teacher at the distillation weight $\lambda s$.

    Examples:
        >>> prediction = predict("beta(0.5,0.5)", 25_030)
        >>> round(prediction.teacher_residual, 3), round(prediction.student_residual, 3)
        (0.048, 0.023)

    Args:
        kernel: The teacher's kernel.
        total_steps: The horizon T.
        distill_weight: The weight lambda of the distillation loss. Default: 0.9, as in the published recipes.
        update_every: The number of steps between the teacher's updates.
    """
    lam = checks.distill_weight("predict", distill_weight)
    built = kernels.build(kernel)
    if isinstance(built, kernels.Gap):
        omegas = _gap_omegas(built, total_steps, update_every, lam)
    else:
        omegas = _omegas(built, total_steps, update_every)
    left = np.cumprod(1.0 - omegas / (1.0 + lam))
    before = float(left[-2]) if total_steps > 1 else 1.0
    return Prediction(
        kernel=str(built),
        total_steps=total_steps,
        distill_weight=lam,
        teacher_residual=float(left[-1]),
        student_residual=lam / (1.0 + lam) * before,
        # Written out instead of subtracting the two shares, which cancel at large lambda.
        gap=float(1.0 - omegas[-1]) / (1.0 + lam) * before,
        start_weight=float(np.prod(1.0 - omegas)),
    )


def persistence_bound(kernel: KernelLike, total_steps: int, update_every: int = 1) -> float:
    r"""Return $w_{0|T}$, a lower bound on the teacher's distance from its student.

    If no state lies beyond the last one in the direction of travel, that is
    $\langle W^T - W^k, W^T - W^0 \rangle \ge 0$ for all k, then
    $\|W^T - M^T\| \ge w_{0|T} \|W^T - W^0\|$. This is the case for a trajectory that is monotone along
    $W^T - W^0$. It is not enough that it is monotone along another direction: then the bound holds only for
    the components along that direction.

    Args:
        kernel: The teacher's kernel.
        total_steps: The horizon T.
        update_every: The number of steps between the teacher's updates.
    """
    return float(np.prod(1.0 - _omegas(kernels.build(kernel), total_steps, update_every)))


def _matrix(argument: str, value: Any) -> Array:
    try:
        matrix = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{argument} must be a matrix of real numbers: {error}") from None
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(f"{argument} must be a matrix, got shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise ValueError(
            f"{argument} must be finite, got {np.sum(~np.isfinite(matrix))} entries that are not finite"
        )
    return matrix


def _gap_omegas(kernel: kernels.Gap, total_steps: int, update_every: int, lam: float) -> Array:
    """Return the omega_1..omega_T that `gap` chooses, with 0 for the steps that `update_every` skips."""
    total_steps = checks.positive_int("total_steps", total_steps)
    update_every = checks.positive_int("update_every", update_every)
    limit = kernel.share * (1.0 + lam) / (1.0 + lam * kernel.share)
    steps = np.arange(1, total_steps + 1)
    due = (steps % update_every == 0) | (steps == total_steps)
    # Student and teacher are on the line from the optimum to the start. If the teacher is at the share e of
    # it, the student goes to lam / (1 + lam) e, and the teacher to e* + lam / (1 + lam) (1 - s) (e - e*).
    left = limit + (1.0 - limit) * (lam * (1.0 - kernel.share) / (1.0 + lam)) ** np.append(0, np.cumsum(due))
    return (1.0 + lam) * (1.0 - left[1:] / left[:-1])
