"""The model and the losses of DINO and its relatives: a backbone and heads over crops of several sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from wmateacher.integrations.dino.masks import Masks
from wmateacher.losses.logits import DINO

__all__ = ["MLP", "Head", "MultiCrop", "MultiCropLoss", "Output", "PairLoss", "koleo", "masked_loss"]


class Output(NamedTuple):
    """The output for V crops of B images.

    Attributes:
        features: The backbone's features, shape `[V, B, D]`.
        logits: The head's logits, or the projections of BYOL and MoCo v3, shape `[V, B, K]`.
        predictions: The predictor's output for the projections, shape `[V, B, K]`; None without a predictor.
        patches: The logits of the masked patches of the global crops, shape `[H, K]`; None without masks.
    """

    features: Tensor
    logits: Tensor
    predictions: Tensor | None = None
    patches: Tensor | None = None


class MLP(nn.Sequential):
    """Linear layers for inputs `[..., D]`, with an activation between them, and batch norms before it.

    Args:
        widths: The widths of the input, of the hidden layers, and of the output.
        batch_norm: Whether to normalise the hidden layers over all rows of the input.
        activation: The class of the activation.
    """

    def __init__(self, widths: Sequence[int], *, batch_norm: bool, activation: Callable[[], nn.Module]):
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise(widths)):
            is_last = i == len(widths) - 2
            layers.append(nn.Linear(before, after, bias=is_last or not batch_norm))
            if not is_last:
                layers += [nn.BatchNorm1d(after)] if batch_norm else []
                layers.append(activation())
        super().__init__(*layers)

    def forward(self, rows: Tensor) -> Tensor:
        """Return the output `[..., K]` for inputs `[..., D]`."""
        return super().forward(rows.flatten(0, -2)).unflatten(0, rows.shape[:-1])


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
        widths = [width, *[hidden] * (layers - 1), bottleneck]
        self.mlp = MLP(widths, batch_norm=batch_norm, activation=nn.GELU)
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
        return self.last(F.normalize(self.mlp(features), dim=-1))

    def hold_last_layer(self) -> None:
        """Drop the gradients of the last layer, so that the optimizer does not change it."""
        for parameter in self.last.parameters():
            parameter.grad = None

    def _norms_and_directions(self) -> tuple[Tensor, Tensor]:
        weight = self.last.parametrizations.weight
        return weight.original0, weight.original1


class MultiCrop(nn.Module):
    """A backbone and heads for crops of any sizes; crops of one size go through as one batch.

    Args:
        backbone: Maps images `[N, 3, H, W]` to features `[N, D]`. With `patch_head`, a vision transformer of
            timm.
        head: Maps features to logits.
        predictor: Maps the head's output to predictions of the teacher's, in BYOL and MoCo v3.
        patch_head: Maps the tokens of patches to logits, for iBOT's term. It may be `head` itself.

    Raises:
        ValueError: If the patches of the backbone cannot be masked.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        predictor: nn.Module | None = None,
        patch_head: nn.Module | None = None,
    ):
        super().__init__()
        self.backbone, self.head, self.predictor, self.patch_head = backbone, head, predictor, patch_head
        if patch_head is not None:
            if not all(hasattr(backbone, name) for name in ("patch_embed", "num_prefix_tokens")):
                raise ValueError(
                    "iBOT's term masks the patches of a vision transformer of timm, got a backbone of class "
                    f"{type(backbone).__name__}: choose another backbone, such as vit_tiny_patch16_224, or "
                    "ibot=0"
                )
            width: Any = backbone.num_features
            self.mask_token = nn.Parameter(torch.zeros(width))

    def forward(self, crops: Sequence[Tensor], masks: Masks | None = None, hide: bool = True) -> Output:
        """Return the features and the heads' outputs of V crops `[B, 3, H, W]` of the same B images.

        Args:
            crops: The crops, the global ones first.
            masks: The masked patches of the first crops, as many as there are masks.
            hide: Whether the backbone sees a learned token in place of the masked patches, as the student
                does. The teacher sees the patches.
        """
        found, patches = [], None
        masked = 0 if masks is None else len(masks.hidden) // len(crops[0])
        for (is_masked, _), same in groupby(enumerate(crops), lambda item: (item[0] < masked, item[1].shape)):
            images = torch.cat([crop for _, crop in same])
            if masks is None or not is_masked:
                found.append(self.backbone(images))
            else:
                tokens = self._tokens(images, masks.hidden if hide else None)
                found.append(self.backbone.forward_head(tokens))  # type: ignore[operator]
                flat = tokens[:, self.backbone.num_prefix_tokens :].flatten(0, 1)
                assert self.patch_head is not None
                patches = self.patch_head(flat[masks.positions])
        features = torch.cat(found).unflatten(0, (len(crops), -1))
        logits = self.head(features)
        return Output(features, logits, None if self.predictor is None else self.predictor(logits), patches)

    def _tokens(self, images: Tensor, hidden: Tensor | None) -> Tensor:
        """Return the last layer's tokens `[N, prefix + P, D]`, with the mask token for hidden patches."""
        backbone: Any = self.backbone
        if hidden is None:
            return backbone.forward_features(images)

        def mask(module: nn.Module, inputs: Any, embedded: Tensor) -> Tensor:
            # [N, P, D], or [N, rows, columns, D] for a backbone of any image size.
            hide = hidden.reshape(*embedded.shape[:-1], 1)
            return torch.where(hide, self.mask_token.to(embedded.dtype), embedded)

        # The hook lives for this call alone: a copy of the network has none.
        handle = backbone.patch_embed.register_forward_hook(mask)
        try:
            return backbone.forward_features(images)
        finally:
            handle.remove()


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


class PairLoss(nn.Module):
    """Compare the student's prediction of a crop with the teacher's projections of other global crops.

        mean over t < G, s < V, s != t of  criterion(prediction_S(s), projection_T(t))

    With two crops this is the symmetric loss of BYOL (Grill et al. 2020, section 3.1) for `2*cosine`, and of
    MoCo v3 (Chen et al. 2021, algorithm 1) for `0.4*info_nce(0.2)`, but for a factor of 2: the papers add the
    two directions, and this is their mean.

    Args:
        criterion: A criterion for features.
    """

    def __init__(self, criterion: nn.Module):
        super().__init__()
        self.criterion = criterion

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss, 0-d.

        Args:
            student: The predictions of all V crops, the global ones first, shape `[V, B, K]`.
            teacher: The projections of the G global crops, shape `[G, B, K]`.
        """
        pairs = [(s, t) for t in range(len(teacher)) for s in range(len(student)) if s != t]
        return torch.stack([self.criterion(student[s], teacher[t]) for s, t in pairs]).mean()


def masked_loss(criterion: DINO, student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Return iBOT's term, the cross-entropy between teacher and student at the patches that it alone sees.

    This is equation 2 of Zhou et al. 2022, as a mean over the masked patches of an image, and then over all
    images as in DINOv2: images without masked patches count with 0.

    Args:
        criterion: The loss of the registry with the centring and the temperatures of patches.
        student: The student's logits of the masked patches, shape `[H, K]`.
        teacher: The teacher's, shape `[H, K]`.
        weights: The weights of `Masks`, shape `[H]`.
    """
    with torch.autocast(student.device.type, enabled=False):
        targets = criterion.targets(teacher.float())
        log_p = (student.float() / criterion.student_temperature).log_softmax(-1)
        return -((targets * log_p).sum(-1) * weights).sum()


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
