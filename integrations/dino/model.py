"""The model and the loss of DINO: a backbone and a projection head over crops of several sizes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from wmateacher.losses.logits import DINO

__all__ = ["Head", "MultiCrop", "MultiCropLoss", "Output", "koleo"]


class Output(NamedTuple):
    """The output for V crops of B images.

    Attributes:
        features: The backbone's features, shape `[V, B, D]`.
        logits: The head's logits, shape `[V, B, K]`.
    """

    features: Tensor
    logits: Tensor


class Head(nn.Module):
    """An MLP with GELU, L2 normalisation, and a weight-normalised linear layer without bias.

    This is the head of Caron et al. 2021, appendix C; the default widths are theirs.

    Args:
        width: The width D of the features.
        outputs: The number of logits K.
        hidden: The width of the MLP's hidden layers.
        bottleneck: The width of the normalised layer.
        layers: The number of linear layers of the MLP; 1 is a single linear map.
        unit_norm: Whether to keep the rows of the last layer at norm 1, which is more stable. Otherwise their
            norms are learned.
        batch_norm: Whether to use batch normalisation in the MLP, an option of the paper. It spreads the
            outputs of an untrained backbone.

    Raises:
        ValueError: If a size is below 1.
    """

    def __init__(
        self,
        width: int,
        outputs: int = 65536,
        hidden: int = 2048,
        bottleneck: int = 256,
        layers: int = 3,
        unit_norm: bool = True,
        batch_norm: bool = False,
    ):
        super().__init__()
        sizes = {"width": width, "outputs": outputs, "hidden": hidden, "bottleneck": bottleneck}
        for name, size in {**sizes, "layers": layers}.items():
            if size < 1:
                raise ValueError(f"Head: {name} must be at least 1, got {size}")
        self.width = width
        inner = [hidden] * (layers - 1)
        mlp: list[nn.Module] = []
        for i, (before, after) in enumerate(zip([width, *inner], [*inner, bottleneck], strict=True)):
            mlp += [nn.GELU()] if i else []
            mlp.append(nn.Linear(before, after, bias=not batch_norm or i == layers - 1))
            mlp += [nn.BatchNorm1d(after)] if batch_norm and i < layers - 1 else []
        self.mlp = nn.Sequential(*mlp)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        last = nn.Linear(bottleneck, outputs, bias=False)
        self.last = parametrizations.weight_norm(last)
        norms, _ = self._norms_and_directions()
        nn.init.ones_(norms)
        norms.requires_grad_(not unit_norm)

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits `[..., K]` of features `[..., D]`.

        Raises:
            ValueError: If the features have another width.
        """
        if features.shape[-1] != self.width:
            raise ValueError(
                f"the head was built for features of width {self.width}, got {features.shape[-1]}: give "
                f"Head(width={features.shape[-1]}), the backbone's num_features"
            )
        hidden = self.mlp(features.flatten(0, -2)).unflatten(0, features.shape[:-1])
        return self.last(F.normalize(hidden, dim=-1))

    def hold_last_layer(self) -> None:
        """Drop the gradients of the last layer, so that the optimizer does not change it."""
        for parameter in self.last.parameters():
            parameter.grad = None

    def _norms_and_directions(self) -> tuple[Tensor, Tensor]:
        weight = self.last.parametrizations.weight
        return weight.original0, weight.original1


class MultiCrop(nn.Module):
    """A backbone and a head for crops of any sizes; crops of one size go through as one batch.

    Args:
        backbone: Maps images `[N, 3, H, W]` to features `[N, D]`.
        head: Maps features to logits.
    """

    def __init__(self, backbone: nn.Module, head: Head):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, crops: Sequence[Tensor]) -> Output:
        """Return the features and logits of V crops `[B, 3, H, W]` of the same B images."""
        features = torch.cat(
            [self.backbone(torch.cat(list(same))) for _, same in groupby(crops, lambda crop: crop.shape)]
        )
        features = features.unflatten(0, (len(crops), -1))
        return Output(features, self.head(features))


class MultiCropLoss(nn.Module):
    """Compare every crop of the student with every other global crop of the teacher.

        mean over t < G, s < V, s != t of  H(p_T(t), p_S(s))

    The centring, the temperatures and the update of the centre are those of the registry's `dino` (Caron et
    al. 2021, equation 3 and algorithm 1). Crop v of the student and crop v of the teacher are the same crop.

    Args:
        criterion: The loss of the registry with the centring and the temperatures.
    """

    def __init__(self, criterion: DINO):
        super().__init__()
        self.criterion = criterion

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss and the teacher's probabilities.

        Args:
            student: The logits of all V crops, the global ones first, shape `[V, B, K]`.
            teacher: The logits of the G global crops, shape `[G, B, K]`.

        Returns:
            The loss, 0-d, and p_T, shape `[G, B, K]`.

        Raises:
            ValueError: If there are fewer crops than global crops, no pair of different crops, or the shapes
                do not match.
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
    """Return -mean_i log min_{j != i} |x_i - x_j| of the L2-normalised rows, which spreads the features.

    This is the Kozachenko-Leonenko estimate of the entropy (Sablayrolles et al. 2019, section 3.2). DINOv2
    adds it with weight 0.1 on the student's first global crop.

    Args:
        features: The features, shape `[B, D]` with B >= 2.

    Raises:
        ValueError: If there are fewer than two rows.
    """
    if len(features) < 2:
        raise ValueError(f"koleo needs at least two rows of features, got shape {list(features.shape)}")
    with torch.autocast(features.device.type, enabled=False):
        unit = F.normalize(features.float(), dim=-1)
        with torch.no_grad():
            similarity = unit @ unit.mT
            nearest = similarity.fill_diagonal_(-1).argmax(1)
        return -F.pairwise_distance(unit, unit[nearest], eps=1e-8).log().mean()
