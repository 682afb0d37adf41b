"""Losses between the features `[B, ...]` of one layer, or between embeddings.

f_S and f_T are the student's and the teacher's features.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from wmateacher import checks
from wmateacher.losses.numerics import upcast
from wmateacher.losses.registry import add_family, register

__all__ = ["cosine", "feature_mse", "relational"]

_TAKES = "a tensor of features [B, ...]"

# Avoids dividing by 0 when all rows of a batch are identical.
_SMALLEST_MEAN_DISTANCE = 1e-12


def __dir__() -> list[str]:
    return __all__


def _prepare(student: Any, teacher: Any) -> tuple[Tensor, Tensor]:
    for who, value in (("student", student), ("teacher", teacher)):
        if checks.floating_tensor(who, value, _TAKES).ndim == 0:
            raise ValueError(f"{who} must be {_TAKES}, got a 0-d tensor")
    checks.same_batch("a features loss", student, teacher)
    return upcast(student, teacher.detach())


_family = add_family("features", _TAKES, _prepare)


@register("feature_mse", family="features")
@_family.standalone
def feature_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean squared error, the element-wise mean of (f_S - f_T)^2.

    Raises:
        ValueError: If the shapes differ.
    """
    checks.same_shape("feature_mse", student, teacher)
    return F.mse_loss(student, teacher)


@register("cosine", family="features")
@_family.standalone
def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the cosine distance, the mean of 1 - cos(f_S, f_T) over all but the last dimension.

    Raises:
        ValueError: If the shapes differ, or there is no dimension after the batch.
    """
    checks.same_shape("cosine", student, teacher)
    if student.ndim < 2:
        raise ValueError(
            f"cosine needs features [B, ..., d], got shape {list(student.shape)}; "
            "add the feature dimension, for instance with .unsqueeze(-1)"
        )
    return (1 - F.cosine_similarity(student, teacher, dim=-1)).mean()


@register("relational", family="features")
@_family.standalone
def relational(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute relational distillation, the mean over pairs i < j of huber(psi_S(i, j) - psi_T(i, j)).

    The distance-wise loss of RKD (Park et al. 2019, eqs. 4-7): psi(i, j) = |f_i - f_j| / mu, where mu is
    the mean distance in the batch, and huber has the threshold 1. Only relations are compared, so the
    shapes after the batch may differ.

    Raises:
        ValueError: If the batch has fewer than two rows.
    """
    if student.shape[0] < 2:
        raise ValueError(
            f"relational compares pairs and needs a batch of at least 2, got shape "
            f"{list(student.shape)}; leave the term out for such a batch"
        )
    return F.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher))


def _relative_distances(features: Tensor) -> Tensor:
    """Return the distance of every pair divided by their mean, shape `[B (B - 1) / 2]`."""
    # Not the square root of a Gram matrix: its gradient at distance 0 is NaN, that of pdist is 0.
    distances = F.pdist(features.reshape(len(features), -1))
    return distances / distances.mean().clamp_min(_SMALLEST_MEAN_DISTANCE)
