"""DINO's loss over crops, and KoLeo."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wmateacher.losses.logits import DINO


class MultiCropLoss(nn.Module):
    """Every crop of the student against every other global crop of the teacher.

        mean over t < G, s < V, s != t of  H(p_T(t), p_S(s))

    with the registry's `dino`: its centring, temperatures and order of the centre's update (Caron et al.
    2021, equation 3 and algorithm 1). Crop v of the student and of the teacher are the same crop.

    Args:
        criterion: Centring and temperatures.
    """

    def __init__(self, criterion: DINO):
        super().__init__()
        self.criterion = criterion

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and the teacher's probabilities.

        Args:
            student: Logits of all V crops, the global ones first, `[V, B, K]`.
            teacher: Logits of the G global crops, `[G, B, K]`.

        Returns:
            The loss, 0-d, and p_T `[G, B, K]`.

        Raises:
            ValueError: There are fewer crops than global ones, no pair of different crops, or the
                shapes differ otherwise.
        """
        views, globals_ = len(student), len(teacher)
        if views < max(2, globals_) or student.shape[1:] != teacher.shape[1:]:
            raise ValueError(
                "MultiCropLoss needs student [V, B, K] and teacher [G, B, K] with V >= G and V >= 2, got "
                f"{list(student.shape)} and {list(teacher.shape)}"
            )
        with torch.autocast(student.device.type, enabled=False):
            targets = self.criterion.targets(teacher.float())
            others = targets.sum(0).expand_as(student).clone()
            others[:globals_] -= targets
            log_p = (student.float() / self.criterion.student_temperature).log_softmax(-1)
            pairs = views * globals_ - globals_
            return -(others * log_p).sum(-1).mean(-1).sum() / pairs, targets


def koleo(features: Tensor) -> Tensor:
    """-mean_i log min_{j != i} |x_i - x_j| of L2-normalised rows: spreads features over the sphere.

    Kozachenko-Leonenko entropy (Sablayrolles et al. 2019, section 3.2; DINOv2 adds it with weight 0.1 on
    the student's first global crop).

    Args:
        features: `[B, D]` with B >= 2.

    Raises:
        ValueError: There is no second row.
    """
    if len(features) < 2:
        raise ValueError(f"koleo needs at least two rows of features, got shape {list(features.shape)}")
    with torch.autocast(features.device.type, enabled=False):
        unit = F.normalize(features.float(), dim=-1)
        with torch.no_grad():
            similarity = unit @ unit.mT
            nearest = similarity.fill_diagonal_(-1).argmax(1)
        return -F.pairwise_distance(unit, unit[nearest], eps=1e-8).log().mean()
