r"""The paper's linear world, in which the bias of every method and the gap of every teacher have a formula.

Source: the linear world of the theory section of TRACER (Asadollahzadeh et al., ICML 2026).

A linear image encoder `W [d, d_I]` sees features `X [d_I, n]`; the text features are frozen. The
contrastive task pulls `W X` to targets `Y` ($\frac12 \|W X - Y\|_F^2$), and starts at `W^0`. With the
projector `P` onto the span of `X`, the task's subspace, and its optimum `W*`:

- fine-tuning by gradient descent ends at $W^0 (I - P) + W^*$;
- an L2 pull to the start at $(Y X^T + \lambda W^0)(C + \lambda I)^{-1}$, $C = X X^T$;
- distillation from a static teacher at $W^0 (I - \frac{P}{1 + \lambda}) + \frac{W^*}{1 + \lambda}$;
- distillation from an average M, one exact inner solution a step, obeys with $E^t = (M^t - W^*) P$

  $$E^t = \Big(1 - \frac{\omega_t}{1 + \lambda}\Big) E^{t-1}, \qquad
    (W^t - W^*) P = \frac{\lambda}{1 + \lambda} E^{t-1},$$

  so that kernel, horizon and lambda alone say which share of the start's bias is left: `predict`.

What the algebra does not say, though it is easily read into it:

- The L2 pull, too, leaves what lies outside the task's subspace exactly where it was. It differs from
  distillation inside, where it mixes start and optimum by the eigenvalues of `C`.
- The bias under a weighted average does not vanish at any finite horizon. It shrinks as
  T^(-a / (1 + lambda)) for Beta(a, b), whose early exponent alone decides, and vanishes in the limit
  because the omegas sum to infinity.
- An EMA collapses onto its student if its retention is short against the horizon. A slow one does not
  within it: look at `predict("ema(0.999)", 2_000, 0.9)`.
- The bound of `persistence_bound` is weak, W^0's own weight being small over a long run (0.00285 for
  Beta(0.5, 0.5) over 25,030 steps), and it needs the right direction: the one from W^0 to W^T.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from wmateacher import kernels
from wmateacher.kernels import Array, Kernel, KernelLike
from wmateacher.schedule import Clock

# Singular values up to this share of the largest count as 0.
_RANK = 1e-10


def contrastive_targets(text_weights: Array, text_features: Array) -> Array:
    r"""What the contrastive task pulls the images' embeddings to: $Y = W_T^0 X_T (n I - J)$.

    Args:
        text_weights: `W_T^0 [d, d_T]`, the frozen text encoder.
        text_features: `X_T [d_T, n]`, the text of each image.

    Returns:
        float64 `[d, n]`: n times each text's embedding minus all embeddings' sum.
    """
    weights, features = _matrix("text_weights", text_weights), _matrix("text_features", text_features)
    if weights.shape[1] != features.shape[0]:
        raise ValueError(
            f"text_weights {weights.shape} and text_features {features.shape} do not multiply: "
            "[d, d_T] and [d_T, n] are needed"
        )
    embedded = weights @ features
    return embedded.shape[1] * embedded - embedded.sum(axis=1, keepdims=True)


def projector(features: Array) -> Array:
    r"""The projector onto the task's subspace, $P = X (X^T X)^+ X^T$.

    Args:
        features: `X [d_I, n]`, of any rank; directions below 1e-10 of the largest count as none.

    Returns:
        float64 `[d_I, d_I]`.
    """
    basis, _, _ = _svd(_matrix("features", features))
    return basis @ basis.T


def _svd(features: Array) -> tuple[Array, Array, Array]:
    """The singular vectors and values of X that count: `[d_I, r]`, `[r]`, `[r, n]`."""
    left, values, right = np.linalg.svd(features, full_matrices=False)
    rank = int(np.sum(values > _RANK * values[0]))
    return left[:, :rank], values[:rank], right[:rank]


@dataclass(frozen=True, eq=False)
class LinearWorld:
    """A linear task and where its training starts.

    Attributes:
        features: `X [d_I, n]`.
        targets: `Y [d, n]`; `contrastive_targets` gives the paper's.
        start: `W^0 [d, d_I]`.
    """

    features: Array
    targets: Array
    start: Array

    def __post_init__(self) -> None:
        for name in ("features", "targets", "start"):
            # A copy of its own: what is cached must not age when the caller's array changes.
            matrix = _matrix(name, getattr(self, name)).copy()
            matrix.flags.writeable = False
            object.__setattr__(self, name, matrix)
        (width, examples), (out, rows), start = self.features.shape, self.targets.shape, self.start.shape
        if rows != examples or start != (out, width):
            raise ValueError(
                f"features {self.features.shape}, targets {self.targets.shape} and start {start} do not fit: "
                "[d_I, n], [d, n] and [d, d_I] are needed"
            )

    @cached_property
    def projector(self) -> Array:
        """P `[d_I, d_I]`."""
        return projector(self.features)

    @cached_property
    def covariance(self) -> Array:
        """C = X X^T `[d_I, d_I]`."""
        return self.features @ self.features.T

    @cached_property
    def optimum(self) -> Array:
        """W* = Y X^T C^+ `[d, d_I]`, the task's solution of least norm."""
        return self.targets @ np.linalg.pinv(self.features, rcond=_RANK)

    def task_loss(self, weights: Array) -> float:
        """1/2 |W X - Y|_F^2."""
        return 0.5 * float(np.sum((self._encoder(weights) @ self.features - self.targets) ** 2))

    def residual(self, weights: Array) -> float:
        """|(W - W*) P|_F: how far from the task's optimum inside its subspace."""
        return float(np.linalg.norm((self._encoder(weights) - self.optimum) @ self.projector))

    def finetuned(self) -> Array:
        """Where gradient descent on the task ends: W^0 (I - P) + W*."""
        return self.start - self.start @ self.projector + self.optimum

    def l2_sp(self, lam: float) -> Array:
        """Where it ends with lam / 2 |W - W^0|^2 added: (Y X^T + lam W^0)(C + lam I)^-1."""
        lam = _strength(lam, positive=True)
        # By singular vectors: with a small lam, C + lam I is numerically singular outside the subspace.
        left, values, right = _svd(self.features)
        inside = (self.targets @ right.T * values + lam * (self.start @ left)) / (values**2 + lam)
        return self.start - self.start @ self.projector + inside @ left.T

    def static_distillation(self, lam: float) -> Array:
        """Where it ends with lam / 2 |(W - W^0) X|^2 added: W^0 (I - P / (1 + lam)) + W* / (1 + lam)."""
        share = 1.0 / (1.0 + _strength(lam))
        return self.start - share * (self.start @ self.projector) + share * self.optimum

    def _encoder(self, weights: Array) -> Array:
        if np.shape(weights) != self.start.shape:
            raise ValueError(
                f"weights must have the shape of start, {self.start.shape}, got {np.shape(weights)}"
            )
        return weights


@dataclass(frozen=True, eq=False)
class Distillation:
    """A run of `distil`.

    Attributes:
        student: W^T `[d, d_I]`.
        teacher: M^T `[d, d_I]`.
        teacher_residual: |(M^t - W*) P| for t = 0..T.
        student_residual: |(W^t - W*) P|.
        gap: |M^t - W^t|.
    """

    student: Array
    teacher: Array
    teacher_residual: Array
    student_residual: Array
    gap: Array


def distil(
    world: LinearWorld, kernel: KernelLike, total_steps: int, lam: float, update_every: int = 1
) -> Distillation:
    r"""Distil from a weighted average, solving each step exactly.

    $W^t = W^{t-1} (I - P) + a M^{t-1} P + W^* / (1 + \lambda)$ with $a = \lambda / (1 + \lambda)$, the
    minimum of $\frac12 \|W X - Y\|^2 + \frac\lambda2 \|(W - M^{t-1}) X\|^2$ nearest to $W^{t-1}$.

    Args:
        world: The task.
        kernel: The teacher's.
        total_steps: The horizon T.
        lam: Strength of the distillation.
        update_every: Steps between the teacher's snapshots.
    """
    lam = _strength(lam)
    clock = Clock(kernels.build(kernel), total_steps, update_every)
    inside, optimum = world.projector, world.optimum
    student, teacher = world.start, world.start
    course = [_distances(world, student, teacher)]
    for _ in range(total_steps):
        student = student - student @ inside + (lam * teacher @ inside + optimum) / (1.0 + lam)
        omega = clock.tick() or 0.0
        teacher = teacher + omega * (student - teacher)
        course.append(_distances(world, student, teacher))
    return Distillation(student, teacher, *np.array(course).T)


def _distances(world: LinearWorld, student: Array, teacher: Array) -> tuple[float, float, float]:
    return world.residual(teacher), world.residual(student), float(np.linalg.norm(teacher - student))


@dataclass(frozen=True)
class Prediction:
    """What a kernel leaves of the start's bias |(W^0 - W*) P|, as shares of it; `str` gives a small table.

    Attributes:
        kernel: Its text.
        total_steps: The horizon T.
        lam: Strength of the distillation.
        teacher_residual: |(M^T - W*) P|.
        student_residual: |(W^T - W*) P|.
        gap: |M^T - W^T|: how far teacher and student are apart at the end.
        start_weight: w_{0|T}, W^0's own weight in the teacher.
    """

    kernel: str
    total_steps: int
    lam: float
    teacher_residual: float
    student_residual: float
    gap: float
    start_weight: float

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{self.kernel} over {self.total_steps} steps, lambda = {self.lam:g}",
                f"  bias left, teacher     {self.teacher_residual:.2%}",
                f"  bias left, student     {self.student_residual:.2%}",
                f"  gap at the end         {self.gap:.2%}",
                f"  weight of W^0          {self.start_weight:.3%}",
            ]
        )


def predict(kernel: KernelLike, total_steps: int, lam: float = 0.9, update_every: int = 1) -> Prediction:
    r"""What a kernel leaves of the start's bias in the linear world, before any training.

    The teacher's share is $e_T = \prod_t (1 - \omega_t / (1 + \lambda))$, the student's
    $\frac{\lambda}{1 + \lambda} e_{T-1}$. Teacher and student lie on one line from the optimum to the
    start, so that the gap is the difference of the two, $\frac{1 - \omega_T}{1 + \lambda} e_{T-1}$.

    Example:
        >>> prediction = predict("beta(0.5,0.5)", 25_030)
        >>> round(prediction.teacher_residual, 3), round(prediction.student_residual, 3)
        (0.048, 0.023)

    Args:
        kernel: The teacher's.
        total_steps: The horizon T.
        lam: Strength of the distillation. Default 0.9, the published recipes'.
        update_every: Steps between the teacher's snapshots.
    """
    lam = _strength(lam)
    built = kernels.build(kernel)
    omegas = _omegas(built, total_steps, update_every)
    left = np.cumprod(1.0 - omegas / (1.0 + lam))
    before = float(left[-2]) if total_steps > 1 else 1.0
    return Prediction(
        kernel=str(built),
        total_steps=total_steps,
        lam=lam,
        teacher_residual=float(left[-1]),
        student_residual=lam / (1.0 + lam) * before,
        gap=float(1.0 - omegas[-1]) / (1.0 + lam) * before,  # the difference, without its cancellation
        start_weight=float(np.prod(1.0 - omegas)),
    )


def persistence_bound(kernel: KernelLike, total_steps: int, update_every: int = 1) -> float:
    r"""The least share of the way gone that a teacher stays behind: $w_{0|T}$.

    If no state lies beyond the last along the way gone, $\langle W^T - W^k, W^T - W^0 \rangle \ge 0$ for
    all k, as on a trajectory that is monotone along $W^T - W^0$, then
    $\|W^T - M^T\| \ge w_{0|T} \|W^T - W^0\|$. Monotone along another direction is not enough: there
    the bound holds for the components along that direction only.

    Args:
        kernel: The teacher's.
        total_steps: The horizon T.
        update_every: Steps between the teacher's snapshots.
    """
    return float(np.prod(1.0 - _omegas(kernels.build(kernel), total_steps, update_every)))


def _omegas(kernel: Kernel, total_steps: int, update_every: int) -> Array:
    """The weight of each student W^1..W^T when it comes, 0 where no snapshot is due."""
    clock = Clock(kernel, total_steps, update_every)
    if clock.update_every == 1:
        return 1.0 - kernel.retention(np.arange(1, total_steps + 1), total_steps)
    return np.array([clock.tick() or 0.0 for _ in range(total_steps)])


def _matrix(argument: str, value: Any) -> Array:
    try:
        matrix = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{argument} must be a matrix of real numbers: {error}") from None
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(f"{argument} must be a matrix, got shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise ValueError(
            f"{argument} must be finite, got {np.sum(~np.isfinite(matrix))} entries that are not"
        )
    return matrix


def _strength(lam: Any, *, positive: bool = False) -> float:
    try:
        strength = float(lam)
    except (TypeError, ValueError):
        strength = math.nan
    if not math.isfinite(strength) or strength < 0 or (positive and strength == 0):
        raise ValueError(
            f"lam must be a finite number {'above' if positive else 'of at least'} 0, got {lam!r}"
        )
    return strength
