"""What DINO trains: a backbone and a projection head over crops of several sizes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations


class Output(NamedTuple):
    """Of V crops of B images.

    Attributes:
        features: The backbone's, `[V, B, D]`.
        logits: The head's, `[V, B, K]`.
    """

    features: Tensor
    logits: Tensor


class Head(nn.Module):
    """MLP with GELU, L2 normalisation, and a weight-normalised linear layer without bias.

    Caron et al. 2021, appendix C; their widths are the defaults.

    Args:
        width: D, of the features.
        outputs: K.
        hidden: Width of the MLP.
        bottleneck: Width of what is normalised.
        layers: Of the MLP; 1: a single linear map.
        unit_norm: Keep the rows of the last layer at norm 1, which is more stable; learn their norms
            otherwise.
        batch_norm: Normalise the MLP's hidden layers over the batch: the paper's option, which spreads
            the outputs of an untrained backbone.

    Raises:
        ValueError: A size is below 1.
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
        """Logits `[..., K]` of features `[..., D]`.

        Raises:
            ValueError: The features have another width.
        """
        if features.shape[-1] != self.width:
            raise ValueError(
                f"the head was built for features of width {self.width}, got {features.shape[-1]}: give "
                f"Head(width={features.shape[-1]}), the backbone's num_features"
            )
        hidden = self.mlp(features.flatten(0, -2)).unflatten(0, features.shape[:-1])
        return self.last(F.normalize(hidden, dim=-1))

    def hold_last_layer(self) -> None:
        """Forget the last layer's gradients, so that the optimizer leaves it as it is."""
        for parameter in self.last.parameters():
            parameter.grad = None

    def _norms_and_directions(self) -> tuple[Tensor, Tensor]:
        weight = self.last.parametrizations.weight
        return weight.original0, weight.original1


class MultiCrop(nn.Module):
    """A backbone and a head, called with crops of any sizes: those of one size go through as one batch.

    Args:
        backbone: Images `[N, 3, H, W]` to features `[N, D]`.
        head: Features to logits.
    """

    def __init__(self, backbone: nn.Module, head: Head):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, crops: Sequence[Tensor]) -> Output:
        """Features and logits of V crops `[B, 3, H, W]` of the same B images."""
        features = torch.cat(
            [self.backbone(torch.cat(list(same))) for _, same in groupby(crops, lambda crop: crop.shape)]
        )
        features = features.unflatten(0, (len(crops), -1))
        return Output(features, self.head(features))
