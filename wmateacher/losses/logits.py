"""Losses between logits: Hinton's KL, Mean Teacher's MSE, soft cross-entropy and DINO's.

z_S and z_T are the student's and the teacher's logits of one shape `[..., C]`, and p = softmax(z) over the
last dimension. Every loss is the mean over the leading dimensions.

Entries that are masked, with logits of -inf on both sides, contribute 0 to every loss and get no gradient. If
the teacher's logit alone is -inf, only `mse(space=logits)` is infinite. If the student's alone is -inf, where
p_T is not 0, `kl`, `ce`, `dino` and `mse(space=logits)` are infinite.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wmateacher import checks
from wmateacher.losses.gathering import GatherMode
from wmateacher.losses.numerics import (
    cross_entropy,
    kl_divergence,
    sinkhorn_knopp,
    soft_cross_entropy,
    upcast,
    working_dtype,
)
from wmateacher.losses.registry import add_family, register

__all__ = ["DINO", "KL", "MSE", "ce"]

_TAKES = "a tensor of logits [..., C]"


def __dir__() -> list[str]:
    return __all__


def _prepare(student: Any, teacher: Any) -> tuple[Tensor, Tensor]:
    student = checks.floating_tensor("student", student, _TAKES)
    teacher = checks.floating_tensor("teacher", teacher, _TAKES)
    if student.ndim == 0:
        raise ValueError(f"student must be {_TAKES}, got a 0-d tensor")
    checks.same_shape("a logits loss", student, teacher)
    return upcast(student, teacher.detach())


_family = add_family("logits", _TAKES, _prepare)


@register("ce", family="logits")
@_family.standalone
def ce(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the soft cross-entropy, -sum_c p_T log p_S.

    It is `kl` plus the teacher's entropy, and therefore not 0 if both are equal.
    """
    return soft_cross_entropy(student, teacher)


@register("kl", family="logits")
class KL(nn.Module):
    """Distillation at a temperature, tau^2 KL(softmax(z_T / tau) || softmax(z_S / tau)).

    Hinton et al. 2015, section 2. The factor tau^2 keeps the size of the gradient as tau changes.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        """Set the temperature.

        Args:
            temperature: tau, which divides the logits of both sides.

        Raises:
            ValueError: If it is not a finite number above 0.
        """
        super().__init__()
        self.temperature = checks.positive("kl", "temperature", temperature)

    @_family.standalone
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the loss of logits `[..., C]`, a 0-d tensor."""
        tau = self.temperature
        return tau**2 * kl_divergence(student / tau, teacher / tau)


@register("mse", family="logits")
class MSE(nn.Module):
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

    @_family.standalone
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the loss of logits `[..., C]`, a 0-d tensor."""
        if self.space == "logits":
            # The difference of equal logits is 0, also of infinite ones, whose subtraction gives NaN.
            return (student - teacher).masked_fill(student == teacher, 0.0).square().mean()
        return F.mse_loss(student.softmax(-1), teacher.softmax(-1))


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
        return cross_entropy(student / self.student_temperature, self.targets(teacher))

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
