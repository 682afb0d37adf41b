"""Losses between logits: KL both ways, Jensen-Shannon, Mean Teacher's MSE, soft cross-entropy and DINO's.

z_S and z_T are the student's and the teacher's logits of one shape `[..., C]`, and p = softmax(z) over the
last dimension. Every loss is the mean over the leading dimensions. All but `dino` take a `mask` of the
positions that count (see `wmateacher.losses.tokens.token_mask`) and `num_items`, which divides their sum.
They are computed a few rows at a time, so that memory does not grow with the vocabulary or the sequence, and
have no second derivative.

Entries that are masked, with logits of -inf on both sides, contribute 0 to every loss and get no gradient. If
the teacher's logit alone is -inf, only `mse(space=logits)` and (where p_S is not 0) `reverse_kl` are
infinite.
If the student's alone is -inf, where p_T is not 0, `kl`, `ce`, `dino` and `mse(space=logits)` are infinite.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wmateacher import checks
from wmateacher.losses.divergences import (
    CrossEntropy,
    Divergence,
    ForwardKL,
    JensenShannon,
    LogitError,
    ProbabilityError,
    SoftTargets,
    Tempered,
    TopK,
)
from wmateacher.losses.divergences import ReverseKL as ReverseKLDivergence
from wmateacher.losses.gathering import GatherMode
from wmateacher.losses.numerics import (
    sinkhorn_knopp,
    upcast,
    working_dtype,
)
from wmateacher.losses.registry import add_family, register
from wmateacher.losses.tokens import token_mean

__all__ = ["DINO", "JSD", "KL", "MSE", "ReverseKL", "ce"]

_TAKES = "a tensor of logits [..., C]"


def __dir__() -> list[str]:
    return __all__


def _prepare(student: Any, teacher: Any) -> tuple[Tensor, Tensor]:
    student = checks.floating_tensor("student", student, _TAKES)
    teacher = checks.floating_tensor("teacher", teacher, _TAKES)
    if student.ndim == 0:
        raise ValueError(f"student must be {_TAKES}, got a 0-d tensor")
    if student.shape != teacher.shape:
        fix = "give both the same inputs, or select the positions that both have"
        if student.shape[:-1] == teacher.shape[:-1]:
            fix = (
                "the last dimension must be the same classes or vocabulary in the same order; where one side "
                "is padded, cut it off: logits[..., :C]"
            )
        raise ValueError(
            f"a logits loss needs student and teacher of equal shape, got student {list(student.shape)} and "
            f"teacher {list(teacher.shape)}; {fix}"
        )
    return student, teacher.detach()


_family = add_family("logits", _TAKES, _prepare, upcast=upcast)


@register("ce", family="logits")
@_family.standalone
def ce(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, num_items: float | Tensor | None = None
) -> Tensor:
    """Compute the soft cross-entropy, -sum_c p_T log p_S.

    It is `kl` plus the teacher's entropy, and therefore not 0 if both are equal.
    """
    return token_mean(CrossEntropy(), student, teacher, mask, num_items)


class _TokenLoss(nn.Module):
    """The mean of a divergence over the positions that count."""

    def divergence(self) -> Divergence:
        """Return the divergence for the present values of the attributes."""
        raise NotImplementedError

    @_family.standalone
    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        mask: Tensor | None = None,
        num_items: float | Tensor | None = None,
    ) -> Tensor:
        """Compute the loss of logits `[..., C]`, a 0-d tensor; see `Criterion.forward` for the mask."""
        return token_mean(self.divergence(), student, teacher, mask, num_items)


class _Tempered(_TokenLoss):
    """A loss at a temperature, of all classes or of the largest."""

    def __init__(self, name: str, temperature: float, top_k: int | None, tail: bool, support: str) -> None:
        super().__init__()
        self.temperature = checks.positive(name, "temperature", temperature)
        self.support = checks.one_of(f"{name} support", support, ("student", "teacher"))
        self.top_k = None if top_k is None else checks.positive_int(f"{name}: top_k", top_k)
        if not isinstance(tail, bool):
            raise ValueError(f"{name}: tail must be True or False, got {tail!r}")
        self.tail = tail

    def between_rows(self) -> Divergence:
        """Return the divergence between two rows of logits, at temperature 1."""
        raise NotImplementedError

    def divergence(self) -> Divergence:
        """Return the divergence for the present values of the attributes."""
        divergence = self.between_rows()
        if self.top_k is not None:
            divergence = TopK(divergence, self.top_k, tail=self.tail, of_student=self.support == "student")
        return divergence if self.temperature == 1 else Tempered(divergence, self.temperature)


@register("kl", family="logits")
class KL(_Tempered):
    """Distillation at a temperature, tau^2 KL(softmax(z_T / tau) || softmax(z_S / tau)).

    Hinton et al. 2015, section 2. The factor tau^2 keeps the size of the gradient as tau changes.
    """

    def __init__(
        self, temperature: float = 1.0, top_k: int | None = None, tail: bool = True, support: str = "teacher"
    ) -> None:
        """Set the temperature, and which classes to compare.

        Args:
            temperature: tau, which divides the logits of both sides.
            top_k: K, to compare the K classes with the largest logits, and the rest as one bucket. Only their
                probabilities enter: p_c of the K classes as they are, and the sum of all others. None for
                all.
            tail: Whether the rest is compared, too. False leaves it out, and makes the K probabilities sum
                to 1.
            support: The side whose largest logits are meant: "teacher" or "student".

        Raises:
            ValueError: If the temperature is not a finite number above 0, `top_k` is not an integer of at
                least 1, `tail` is not True or False, or `support` is neither of the two.
        """
        super().__init__("kl", temperature, top_k, tail, support)

    def between_rows(self) -> Divergence:
        """Return the divergence between two rows of logits, at temperature 1."""
        return ForwardKL()


@register("reverse_kl", family="logits")
class ReverseKL(_Tempered):
    """The reverse divergence at a temperature, tau^2 KL(softmax(z_S / tau) || softmax(z_T / tau)).

    It seeks the teacher's largest mode where `kl` covers all (MiniLLM, Gu et al. 2024).
    """

    def __init__(
        self, temperature: float = 1.0, top_k: int | None = None, tail: bool = True, support: str = "student"
    ) -> None:
        """Set the temperature, and which classes to compare; see `KL`.

        Args:
            temperature: tau, which divides the logits of both sides.
            top_k: K, to compare the K classes with the largest logits, and the rest as one bucket. None for
                all.
            tail: Whether the rest is compared, too.
            support: The side whose largest logits are meant: "student" or "teacher".

        Raises:
            ValueError: As in `KL`.
        """
        super().__init__("reverse_kl", temperature, top_k, tail, support)

    def between_rows(self) -> Divergence:
        """Return the divergence between two rows of logits, at temperature 1."""
        return ReverseKLDivergence()


@register("jsd", family="logits")
class JSD(_Tempered):
    """The generalised Jensen-Shannon divergence, tau^2 (beta KL(p_T || m) + (1 - beta) KL(p_S || m)).

    m = beta p_T + (1 - beta) p_S, at the temperature tau. GKD (Agarwal et al. 2024), eq. 1; the
    loss of TRL's GKD (`beta`) and SDFT (`distillation_alpha`) trainers, except for tau^2. It is at most log
    2 at beta = 1/2, and tends to 0 at both ends: like beta `kl` as beta goes to 0, like (1 - beta)
    `reverse_kl` as it goes to 1. TRL's trainers compute `kl` at 0 and `reverse_kl` at 1, which are written
    so here.
    """

    def __init__(
        self,
        beta: float = 0.5,
        temperature: float = 1.0,
        top_k: int | None = None,
        tail: bool = True,
        support: str = "student",
    ) -> None:
        """Set the mixture and the temperature, and which classes to compare; see `KL`.

        Args:
            beta: The teacher's share of the mixture.
            temperature: tau, which divides the logits of both sides.
            top_k: K, to compare the K classes with the largest logits, and the rest as one bucket. None for
                all.
            tail: Whether the rest is compared, too.
            support: The side whose largest logits are meant: "student", as in SDPO, or "teacher".

        Raises:
            ValueError: If beta is not in (0, 1); otherwise as in `KL`.
        """
        super().__init__("jsd", temperature, top_k, tail, support)
        rule = "in (0, 1); for its limits write kl (beta = 0 in TRL) or reverse_kl (beta = 1)"
        self.beta = checks.number("jsd", "beta", beta, lambda b: 0 < b < 1, rule)

    def between_rows(self) -> Divergence:
        """Return the divergence between two rows of logits, at temperature 1."""
        return JensenShannon(self.beta)


@register("mse", family="logits")
class MSE(_TokenLoss):
    """Mean squared error, the element-wise mean of (p_S - p_T)^2 or of (z_S - z_T)^2.

    On probabilities it is the consistency cost of Mean Teacher (Tarvainen & Valpola 2017, section 2).
    """

    def __init__(self, space: str = "probabilities") -> None:
        """Choose what to compare.

        Args:
            space: "probabilities" (Mean Teacher) or "logits".

        Raises:
            ValueError: If it is neither of the two.
        """
        super().__init__()
        self.space = checks.one_of("mse space", space, ("probabilities", "logits"))

    def divergence(self) -> Divergence:
        """Return the divergence for the present values of the attributes."""
        return LogitError() if self.space == "logits" else ProbabilityError()


@register("dino", family="logits")
class DINO(nn.Module):
    """Cross-entropy between the centred and sharpened teacher and the student.

    -sum_c p_T log softmax(z_S / tau_S) with p_T = softmax((z_T - center) / tau_T), Caron et al. 2021,
    section 3.1, algorithm 1. Each call first uses the present centre. In training mode it then moves the
    centre: center <- m center + (1 - m) mean(z_T), with the mean over the batches of all ranks. If several
    views make one batch, pass them in one call.

    With `centering="sinkhorn"` there is no centre: p_T is softmax(z_T / tau_T), rescaled by Sinkhorn-Knopp
    until the batch uses all outputs equally (SwAV, Caron et al. 2020, section 3.1; DINOv2).

    Attributes:
        gather_mode: The `GatherMode` that says which ranks' batches count as one; set by `build`.
    """

    center: Tensor

    def __init__(
        self,
        dim: int,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        center_momentum: float = 0.9,
        centering: str = "mean",
    ) -> None:
        """Start with a centre of 0. The default numbers are those of Caron et al. 2021.

        Args:
            dim: C, the width of the head's output.
            student_temperature: tau_S.
            teacher_temperature: tau_T. The paper warms it up from this value: set the attribute
                `teacher_temperature` to follow a schedule.
            center_momentum: m, the share of the centre that each call keeps.
            centering: "mean" (DINO) or "sinkhorn" (three iterations, as in DINOv2).

        Raises:
            ValueError: If `dim` is not an integer of at least 1, a temperature is not a finite number
                above 0, the momentum is not in [0, 1), or the centering is unknown.
        """
        super().__init__()
        self.centering = checks.one_of("dino centering", centering, ("mean", "sinkhorn"))
        self.gather_mode = GatherMode()
        self.dim = checks.width("dino", "dim", dim)
        self.student_temperature = checks.positive("dino", "student_temperature", student_temperature)
        self.teacher_temperature = checks.positive("dino", "teacher_temperature", teacher_temperature)
        self.center_momentum = checks.fraction("dino", "center_momentum", center_momentum)
        self.register_buffer("center", torch.zeros(self.dim))

    @_family.standalone
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the loss of head outputs `[..., dim]`, 0-d; in training mode, move the centre.

        Raises:
            ValueError: If the last dimension is not `dim`.
        """
        return token_mean(SoftTargets(), student / self.student_temperature, self.targets(teacher))

    @torch.no_grad()
    def targets(self, teacher: Tensor) -> Tensor:
        """Return p_T, shape `[..., dim]`; in training mode, move the centre.

        Args:
            teacher: The teacher's head outputs, shape `[..., dim]`.

        Raises:
            ValueError: If the last dimension is not `dim`.
        """
        checks.last_dimension("dino", "dim", self.dim, teacher)
        teacher = teacher.to(working_dtype(teacher))
        if self.centering == "sinkhorn":
            return sinkhorn_knopp(teacher / self.teacher_temperature, self.gather_mode.logsumexp)
        center = self.center.to(teacher.dtype)
        targets = ((teacher - center) / self.teacher_temperature).softmax(-1)
        if self.training:
            # Masked entries have no value that could move the centre.
            values = teacher.where(teacher != -torch.inf, center)
            batch_mean = self.gather_mode.mean(values.reshape(-1, self.dim))
            self.center.lerp_(batch_mean.to(self.center.dtype), 1 - self.center_momentum)
        return targets
