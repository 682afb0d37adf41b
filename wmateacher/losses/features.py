"""Losses between the features `[B, ...]` of one layer, or between embeddings.

f_S and f_T are the student's and the teacher's features.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from wmateacher import checks
from wmateacher.losses.gathering import GatherMode
from wmateacher.losses.numerics import diagonal_cross_entropy, upcast
from wmateacher.losses.registry import add_family, register

__all__ = ["InfoNCE", "cosine", "feature_mse", "relational"]

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


def _check_vectors(name: str, student: Tensor, teacher: Tensor) -> None:
    checks.same_shape(name, student, teacher)
    if student.ndim < 2:
        raise ValueError(
            f"{name} needs features [B, ..., d], got shape {list(student.shape)}; "
            "add the feature dimension, for instance with .unsqueeze(-1)"
        )


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
    _check_vectors("cosine", student, teacher)
    return (1 - F.cosine_similarity(student, teacher, dim=-1)).mean()


@register("info_nce", family="features")
class InfoNCE(nn.Module):
    """Compute InfoNCE, by which each row of the student finds the teacher's row of the same input.

        mean_i -log softmax_j(cos(f_S(i), f_T(j)) / tau)_i

    With a predictor on the student and both orders of two views, 2 tau times this is the loss of MoCo v3
    (Chen et al. 2021, algorithm 1). The candidates j are the teacher's rows on all ranks, unless
    `gather_mode` is "off". The rows i are the rank's own, so the mean over ranks with equally many rows is
    that of the whole batch, for the gradient too.

    Attributes:
        gather_mode: The `GatherMode` that says which ranks' batches count as one; set by `build`.
    """

    def __init__(self, temperature: float = 0.2) -> None:
        """Set the temperature.

        Args:
            temperature: tau; the default is that of MoCo v3.

        Raises:
            ValueError: If the temperature is not a finite number above 0.
        """
        super().__init__()
        self.temperature = checks.positive("info_nce", "temperature", temperature)
        self.gather_mode = GatherMode()

    @_family.standalone
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compute the loss of features `[B, ..., d]`, 0-d; each vector in the last dimension is a row.

        Raises:
            ValueError: If the shapes differ, or there is no dimension after the batch.
        """
        _check_vectors("info_nce", student, teacher)
        rows, candidates = (F.normalize(x, dim=-1).flatten(0, -2) for x in (student, teacher))
        layout = self.gather_mode.layout(candidates)
        if layout is not None:
            candidates = layout.gather_replicated(candidates)
        logits = rows @ candidates.mT / self.temperature
        return diagonal_cross_entropy(logits, 0 if layout is None else layout.first)


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
