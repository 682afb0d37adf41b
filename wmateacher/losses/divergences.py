"""The losses between rows of logits, each with its gradient: the formulas behind `kl`, `jsd` and the others.

A divergence is called with the student's and the teacher's logits `[N, C]` of N positions, in the working
precision. It returns the N losses and, if asked, their derivatives by the student's logits `[N, C]`. Its
inputs are not written to. z_S and z_T are the logits, and p = softmax(z) over a row.

The gradients are written by hand, because each reuses what the value has computed, in place. Entries whose
weight is 0 (p_T in `ForwardKL` and the cross-entropies, p_S in `ReverseKL`) contribute 0, even if a logit is
-inf. A row with a NaN gives NaN.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

__all__ = [
    "CrossEntropy",
    "Divergence",
    "ForwardKL",
    "JensenShannon",
    "LogitError",
    "ProbabilityError",
    "ReverseKL",
    "SoftTargets",
    "Tempered",
    "TopK",
]


def __dir__() -> list[str]:
    return __all__


class Divergence(Protocol):
    """A loss between rows of logits."""

    def __call__(self, student: Tensor, teacher: Tensor, gradient: bool, /) -> tuple[Tensor, Tensor | None]:
        """Return the loss of each row, `[N]`, and with `gradient` the derivatives, a new tensor `[N, C]`."""
        ...


class ForwardKL:
    """KL(p_T || p_S) = sum_c p_T (log p_T - log p_S), with the gradient p_S - p_T."""

    def __call__(self, student: Tensor, teacher: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
        """Return the losses and, if asked, their derivatives."""
        log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
        p, unknown = log_p.exp(), _unknown(log_q, log_p)
        value = _weigh(p, log_p.sub_(log_q), unknown).sum(-1)
        return value, log_q.exp_().sub_(p) if gradient else None


class ReverseKL:
    """KL(p_S || p_T) = sum_c p_S (log p_S - log p_T), with the gradient p_S (log p_S - log p_T - KL)."""

    def __call__(self, student: Tensor, teacher: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
        """Return the losses and, if asked, their derivatives."""
        log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
        q, unknown = log_q.exp(), _unknown(log_q, log_p)
        parts = _weigh(q, log_q.sub_(log_p), unknown)
        value = parts.sum(-1)
        return value, _centre(parts, q, value) if gradient else None


class JensenShannon:
    """beta KL(p_T || m) + (1 - beta) KL(p_S || m) with m = beta p_T + (1 - beta) p_S.

    The gradient is (1 - beta) p_S (log p_S - log m - KL(p_S || m)).
    """

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def __call__(self, student: Tensor, teacher: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
        """Return the losses and, if asked, their derivatives."""
        log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
        log_m = torch.logaddexp(log_q + math.log1p(-self.beta), log_p + math.log(self.beta))
        unknown = _unknown(log_q, log_p)
        of_teacher = _weigh(log_p.exp(), log_p.sub_(log_m), unknown).sum(-1)
        q = log_q.exp()
        parts = _weigh(q, log_q.sub_(log_m), unknown).mul_(1 - self.beta)
        of_student = parts.sum(-1)
        value = of_student + self.beta * of_teacher
        return value, _centre(parts, q, of_student) if gradient else None


class SoftTargets:
    """The cross-entropy -sum_c p_c log p_S against target probabilities p, which take the teacher's place."""

    def __call__(self, student: Tensor, targets: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
        """Return the losses and, if asked, their derivatives."""
        value, q = _cross_entropy(student, targets, gradient)
        return value, None if q is None else q.mul_(targets.sum(-1, keepdim=True)).sub_(targets)


class CrossEntropy:
    """-sum_c p_T log p_S, with the gradient p_S - p_T."""

    def __call__(self, student: Tensor, teacher: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
        """Return the losses and, if asked, their derivatives."""
        p = teacher.softmax(-1)
        value, q = _cross_entropy(student, p, gradient)
        return value, None if q is None else q.sub_(p)


class ProbabilityError:
    """mean_c (p_S - p_T)^2, with the gradient 2/C p_S (p_S - p_T - sum_c p_S (p_S - p_T))."""

    def __call__(self, student: Tensor, teacher: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
        """Return the losses and, if asked, their derivatives."""
        q = student.softmax(-1)
        error = q - teacher.softmax(-1)
        value = torch.linalg.vecdot(error, error).div_(q.shape[-1])
        if not gradient:
            return value, None
        parts = error.mul_(q).mul_(2 / q.shape[-1])
        return value, _centre(parts, q, parts.sum(-1))


class LogitError:
    """mean_c (z_S - z_T)^2, with the gradient 2/C (z_S - z_T)."""

    def __call__(self, student: Tensor, teacher: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
        """Return the losses and, if asked, their derivatives."""
        # The difference of equal logits is 0, also of infinite ones, whose subtraction gives NaN.
        error = (student - teacher).masked_fill_(student == teacher, 0.0)
        value = torch.linalg.vecdot(error, error).div_(error.shape[-1])
        return value, error.mul_(2 / error.shape[-1]) if gradient else None


class Tempered:
    """tau^2 times a divergence of z / tau; the factor keeps the size of the gradient as tau changes."""

    def __init__(self, divergence: Divergence, temperature: float) -> None:
        self.divergence, self.temperature = divergence, temperature

    def __call__(self, student: Tensor, teacher: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
        """Return the losses and, if asked, their derivatives."""
        tau = self.temperature
        value, derivative = self.divergence(student / tau, teacher / tau, gradient)
        return value.mul_(tau**2), None if derivative is None else derivative.mul_(tau)


class TopK:
    """A divergence between the k largest entries of one side, with or without the rest as one bucket.

    The bucket's logit is the log-sum-exp of the other logits, so that the softmax over k + 1 logits has the
    exact probabilities of the k entries and of all others together.
    """

    def __init__(self, divergence: Divergence, k: int, *, tail: bool, of_student: bool) -> None:
        self.divergence, self.k, self.tail, self.of_student = divergence, k, tail, of_student

    def __call__(self, student: Tensor, teacher: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
        """Return the losses and, if asked, their derivatives."""
        logits = student if self.of_student else teacher
        index = logits.topk(min(self.k, logits.shape[-1]), -1, sorted=False).indices
        buckets = self._buckets(student, index)
        value, of_buckets = self.divergence(buckets, self._buckets(teacher, index), gradient)
        if of_buckets is None:
            return value, None
        if self.tail:
            # An empty bucket has the logit -inf, and then all entries that are not overwritten below are
            # -inf.
            rest = buckets[:, -1:].clamp_min(torch.finfo(buckets.dtype).min)
            derivative = (student - rest).exp_().mul_(of_buckets[:, -1:])
        else:
            derivative = torch.zeros_like(student)
        return value, derivative.scatter_(-1, index, of_buckets[:, : index.shape[-1]])

    def _buckets(self, logits: Tensor, index: Tensor) -> Tensor:
        largest = logits.gather(-1, index)
        if not self.tail:
            return largest
        rest = logits.scatter(-1, index, -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat([largest, rest], -1)


def _cross_entropy(student: Tensor, p: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Return -sum_c p log p_S of each row and, if asked, p_S in a new tensor."""
    log_q = student.log_softmax(-1)
    q = log_q.exp() if gradient else None
    return _weigh(p, log_q, _unknown(log_q, p)).sum(-1).neg_(), q


def _weigh(p: Tensor, x: Tensor, unknown: Tensor) -> Tensor:
    """Return p x in the place of x, where p = 0 gives 0 whatever x is; rows that are `unknown` stay NaN."""
    # A NaN comes from 0 times infinity or, where p is 0, from infinity minus infinity, unless the row was NaN
    # before.
    x.mul_(p).nan_to_num_(0.0, torch.inf, -torch.inf)
    x[:, :1].masked_fill_(unknown, torch.nan)  # which makes the row's sum and gradient NaN
    return x


def _unknown(*rows: Tensor) -> Tensor:
    """Return which rows `[N, 1]` are NaN: softmax makes all of a row NaN if one logit is."""
    return torch.stack([r[:, :1].isnan() for r in rows]).any(0)


def _centre(parts: Tensor, q: Tensor, total: Tensor) -> Tensor:
    """Return parts - q total, the gradient of a sum of q x by the logits; both tensors are overwritten."""
    return parts.sub_(q.mul_(total[:, None]))
