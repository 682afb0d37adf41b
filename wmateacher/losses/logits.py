"""Losses between logits: Hinton's KL, Mean Teacher's MSE, soft cross-entropy and DINO's.

z_S, z_T [..., C]: the student's and the teacher's logits of one shape; p = softmax(z) over the last
dimension; every loss is the mean over the leading dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wmateacher import checks
from wmateacher.checks import nearest
from wmateacher.losses.gathering import GatherMode
from wmateacher.losses.numerics import (
    cross_entropy,
    kl_divergence,
    sinkhorn_knopp,
    soft_cross_entropy,
    upcast,
)
from wmateacher.losses.registry import add_family, register

_TAKES = "a tensor of logits [..., C]"


def _prepare(student: Any, teacher: Any) -> tuple[Tensor, Tensor]:
    student = checks.floating_tensor("student", student, _TAKES)
    teacher = checks.floating_tensor("teacher", teacher, _TAKES)
    if student.ndim == 0:
        raise ValueError("student must be a tensor of logits [..., C], got a 0-d tensor")
    checks.same_shape("a logits loss", student, teacher)
    return upcast(student, teacher)


add_family("logits", _TAKES, _prepare)


@register("ce", family="logits")
def ce(student: Tensor, teacher: Tensor) -> Tensor:
    """Soft cross-entropy, -sum_c p_T log p_S: `kl` plus the teacher's entropy, so not 0 at equality."""
    return soft_cross_entropy(student, teacher)


@register("kl", family="logits")
class KL(nn.Module):
    """tau^2 KL(softmax(z_T / tau) || softmax(z_S / tau)).

    Hinton et al. 2015, section 2; tau^2 keeps the gradient's size as tau changes.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        """Set the temperature.

        Args:
            temperature: tau, for both sides.

        Raises:
            ValueError: It is not a finite number above 0.
        """
        super().__init__()
        self.temperature = checks.positive("kl", "temperature", temperature)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of logits [..., C], 0-d."""
        tau = self.temperature
        return tau**2 * kl_divergence(student / tau, teacher / tau)


@register("mse", family="logits")
class MSE(nn.Module):
    """Element-wise mean of (p_S - p_T)^2, or of (z_S - z_T)^2.

    On probabilities the consistency cost of Mean Teacher (Tarvainen & Valpola 2017, section 2).
    """

    def __init__(self, space: str = "probabilities") -> None:
        """Choose what is compared.

        Args:
            space: "probabilities" (Mean Teacher) or "logits".

        Raises:
            ValueError: It is neither.
        """
        super().__init__()
        if space not in ("probabilities", "logits"):
            options = nearest(str(space), ("probabilities", "logits"))
            raise ValueError(f"mse: unknown space {space!r}; {options}")
        self.space = space

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of logits [..., C], 0-d."""
        if self.space == "logits":
            return F.mse_loss(student, teacher)
        return F.mse_loss(student.softmax(-1), teacher.softmax(-1))


_CENTERINGS = ("mean", "sinkhorn")


@register("dino", family="logits")
class DINO(nn.Module):
    """Cross-entropy between the centred, sharpened teacher and the student.

    -sum_c p_T log softmax(z_S / tau_S) with p_T = softmax((z_T - center) / tau_T), Caron et al. 2021,
    section 3.1, algorithm 1. The centre in use is the one from before this batch; then, in training mode
    only, center <- m center + (1 - m) mean(z_T), over the batches of all ranks. Every call moves it:
    where several views make one batch, give them in one call.

    With `centering="sinkhorn"` there is no centre: p_T is the batch's softmax(z_T / tau_T), rescaled by
    Sinkhorn-Knopp until all outputs are used alike (SwAV, Caron et al. 2020, section 3.1; DINOv2).

    Attributes:
        across: Which ranks' batches make one; `build` sets it.
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
        """Start with a centre of 0.

        Args:
            dim: C, the head's output width.
            student_temperature: tau_S; default of Caron et al. 2021.
            teacher_temperature: tau_T; default of the same (its start value, where it is warmed up:
                set the attribute `teacher_temperature` to follow a schedule).
            center_momentum: m; default of the same.
            centering: "mean" (DINO) or "sinkhorn" (three iterations, as in DINOv2).

        Raises:
            ValueError: `dim` is not an integer of at least 1, a temperature not a finite number above
                0, the momentum not in [0, 1), or the centring is unknown.
        """
        super().__init__()
        if centering not in _CENTERINGS:
            raise ValueError(f"dino: unknown centering {centering!r}; {nearest(str(centering), _CENTERINGS)}")
        self.centering = centering
        self.across = GatherMode()
        self.dim = checks.width("dino", "dim", dim)
        self.student_temperature = checks.positive("dino", "student_temperature", student_temperature)
        self.teacher_temperature = checks.positive("dino", "teacher_temperature", teacher_temperature)
        self.center_momentum = checks.fraction("dino", "center_momentum", center_momentum)
        self.register_buffer("center", torch.zeros(self.dim))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of head outputs [..., dim], 0-d; updates the centre in training mode.

        Raises:
            ValueError: The last dimension is not `dim`.
        """
        targets = self.targets(teacher)
        return cross_entropy(student / self.student_temperature, targets)

    @torch.no_grad()
    def targets(self, teacher: Tensor) -> Tensor:
        """p_T of head outputs [..., dim]; moves the centre in training mode.

        Raises:
            ValueError: The last dimension is not `dim`.
        """
        checks.last_dimension("dino", "dim", self.dim, teacher)
        if self.centering == "sinkhorn":
            return sinkhorn_knopp(teacher / self.teacher_temperature, self.across.logsumexp)
        targets = ((teacher - self.center.to(teacher.dtype)) / self.teacher_temperature).softmax(-1)
        if self.training:
            self._update_center(teacher)
        return targets

    def _update_center(self, teacher: Tensor) -> None:
        batch_mean = self.across.mean(teacher.reshape(-1, self.dim))
        self.center.lerp_(batch_mean.to(self.center.dtype), 1 - self.center_momentum)
