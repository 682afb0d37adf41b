"""The losses between two rows of logits, each with its gradient: the formulas behind `kl`, `jsd` and others.

z_S and z_T are the student's and the teacher's logits `[N, C]` of N positions, p = softmax(z). `value` returns
the N losses, `gradient` their derivatives by the student's logits, `[N, C]`. Inputs are in the working
precision and are not written to.

Where an entry's own share is 0 in the limit, it is 0 here: entries with logits of -inf on both sides, and those
whose weight (p_T, for the reverse divergences p_S) is 0.
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
    """A loss of every row, and its gradient."""

    def value(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of each row, shape `[N]`."""
        ...

    def gradient(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the derivative of each row's loss by the student's logits, a new tensor `[N, C]`."""
        ...


class ForwardKL:
    """KL(p_T || p_S) = sum_c p_T (log p_T - log p_S), with the gradient p_S - p_T."""

    def value(self, student: Tensor, teacher: Tensor) -> Tensor:
        log_p = teacher.log_softmax(-1)
        p = log_p.exp()
        return _expectation(p, log_p.sub_(student.log_softmax(-1)))

    def gradient(self, student: Tensor, teacher: Tensor) -> Tensor:
        return student.softmax(-1).sub_(teacher.softmax(-1))


class ReverseKL:
    """KL(p_S || p_T) = sum_c p_S (log p_S - log p_T), with the gradient p_S (log p_S - log p_T - KL)."""

    def value(self, student: Tensor, teacher: Tensor) -> Tensor:
        return ForwardKL().value(teacher, student)

    def gradient(self, student: Tensor, teacher: Tensor) -> Tensor:
        log_p = student.log_softmax(-1)
        p = log_p.exp()
        return _centred(p, log_p.sub_(teacher.log_softmax(-1)))


class JensenShannon:
    """beta KL(p_T || m) + (1 - beta) KL(p_S || m) with m = beta p_T + (1 - beta) p_S.

    The gradient is (1 - beta) p_S (log p_S - log m - KL(p_S || m)).
    """

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def value(self, student: Tensor, teacher: Tensor) -> Tensor:
        log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
        log_m = self._log_mixture(log_q, log_p)
        own = _expectation(log_q.exp(), log_q.sub_(log_m))
        return own.mul_(1 - self.beta).add_(_expectation(log_p.exp(), log_p.sub_(log_m)), alpha=self.beta)

    def gradient(self, student: Tensor, teacher: Tensor) -> Tensor:
        log_q = student.log_softmax(-1)
        log_m = self._log_mixture(log_q, teacher.log_softmax(-1))
        return _centred(log_q.exp(), log_q.sub_(log_m)).mul_(1 - self.beta)

    def _log_mixture(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        return torch.logaddexp(log_q + math.log1p(-self.beta), log_p + math.log(self.beta))


class SoftTargets:
    """The cross-entropy -sum_c p_c log p_S against target probabilities p, which take the teacher's place."""

    def value(self, student: Tensor, targets: Tensor) -> Tensor:
        return _expectation(targets, student.log_softmax(-1)).neg_()

    def gradient(self, student: Tensor, targets: Tensor) -> Tensor:
        return student.softmax(-1).mul_(targets.sum(-1, keepdim=True)).sub_(targets)


class CrossEntropy:
    """-sum_c p_T log p_S, with the gradient p_S - p_T."""

    def value(self, student: Tensor, teacher: Tensor) -> Tensor:
        return SoftTargets().value(student, teacher.softmax(-1))

    def gradient(self, student: Tensor, teacher: Tensor) -> Tensor:
        return ForwardKL().gradient(student, teacher)


class ProbabilityError:
    """mean_c (p_S - p_T)^2."""

    def value(self, student: Tensor, teacher: Tensor) -> Tensor:
        return student.softmax(-1).sub_(teacher.softmax(-1)).square_().mean(-1)

    def gradient(self, student: Tensor, teacher: Tensor) -> Tensor:
        q = student.softmax(-1)
        return _centred(q, (q - teacher.softmax(-1)).mul_(2 / q.shape[-1]))


class LogitError:
    """mean_c (z_S - z_T)^2."""

    def value(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self._difference(student, teacher).square_().mean(-1)

    def gradient(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self._difference(student, teacher).mul_(2 / student.shape[-1])

    def _difference(self, student: Tensor, teacher: Tensor) -> Tensor:
        # The difference of equal logits is 0, also of infinite ones, whose subtraction gives NaN.
        return (student - teacher).masked_fill_(student == teacher, 0.0)


class Tempered:
    """tau^2 times a divergence of z / tau; the factor keeps the size of the gradient as tau changes."""

    def __init__(self, divergence: Divergence, temperature: float) -> None:
        self.divergence, self.temperature = divergence, temperature

    def value(self, student: Tensor, teacher: Tensor) -> Tensor:
        tau = self.temperature
        return self.divergence.value(student / tau, teacher / tau).mul_(tau**2)

    def gradient(self, student: Tensor, teacher: Tensor) -> Tensor:
        tau = self.temperature
        return self.divergence.gradient(student / tau, teacher / tau).mul_(tau)


class TopK:
    """A divergence between the k largest entries of one side, with or without the rest as one bucket.

    The bucket's logit is the log-sum-exp of the other logits, so that the softmax over k + 1 logits has the
    exact probabilities of the k entries and of all others together.
    """

    def __init__(self, divergence: Divergence, k: int, *, tail: bool, of_student: bool) -> None:
        self.divergence, self.k, self.tail, self.of_student = divergence, k, tail, of_student

    def value(self, student: Tensor, teacher: Tensor) -> Tensor:
        index = self._support(student, teacher)
        return self.divergence.value(self._buckets(student, index), self._buckets(teacher, index))

    def gradient(self, student: Tensor, teacher: Tensor) -> Tensor:
        index = self._support(student, teacher)
        buckets = self._buckets(student, index)
        of_buckets = self.divergence.gradient(buckets, self._buckets(teacher, index))
        if self.tail:
            # Without anything in the bucket its logit is -inf, and all entries that are not overwritten are, too.
            rest = buckets[:, -1:].clamp_min(torch.finfo(buckets.dtype).min)
            gradient = (student - rest).exp_().mul_(of_buckets[:, -1:])
        else:
            gradient = torch.zeros_like(student)
        return gradient.scatter_(-1, index, of_buckets[:, : index.shape[-1]])

    def _support(self, student: Tensor, teacher: Tensor) -> Tensor:
        logits = student if self.of_student else teacher
        return logits.topk(min(self.k, logits.shape[-1]), -1, sorted=False).indices

    def _buckets(self, logits: Tensor, index: Tensor) -> Tensor:
        largest = logits.gather(-1, index)
        if not self.tail:
            return largest
        rest = logits.scatter(-1, index, -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat([largest, rest], -1)


def _expectation(p: Tensor, x: Tensor) -> Tensor:
    """Return sum_c p_c x_c, where p_c = 0 gives 0 whatever x_c is; x is overwritten."""
    return x.masked_fill_(p == 0, 0.0).mul_(p).sum(-1)


def _centred(p: Tensor, x: Tensor) -> Tensor:
    """Return p (x - sum_c p_c x_c), where p_c = 0 gives 0 whatever x_c is; x is overwritten."""
    x.masked_fill_(p == 0, 0.0)
    return x.sub_(torch.linalg.vecdot(p, x)[:, None]).mul_(p)
