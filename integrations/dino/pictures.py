"""Pictures of where a network looks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["attention_maps", "draw_maps"]


@torch.no_grad()
def attention_maps(backbone: nn.Module, images: Tensor) -> tuple[str, Tensor]:
    """Return maps of where a backbone looks: the class token's attention in the last block, or activations.

    Args:
        backbone: A timm network; it is not changed.
        images: The network's input, shape `[B, 3, S, S]`.

    Returns:
        A description of the maps, and the maps `[B, M, S, S]`: one for each head of the last block if the
        network has a class token with attention, otherwise one, the norm of the last feature map.

    Raises:
        ValueError: If the last feature map has no two spatial dimensions.
    """
    network = copy.deepcopy(backbone).eval()
    size = images.shape[-2:]
    attention = _attention(network, images)
    if attention is not None:
        return "attention of the class token, last block, by head", _resized(attention, size)
    features = network.forward_features(images)  # type: ignore[operator]
    if features.ndim != 4:
        raise ValueError(
            f"no map to show: the last features have shape {list(features.shape)}, without height and width"
        )
    channels_last = features.shape[1] == features.shape[2] != features.shape[3]
    norm = features.norm(dim=-1 if channels_last else 1)
    return "norm of the last feature map", _resized(norm[:, None], size)


def _attention(network: nn.Module, images: Tensor) -> Tensor | None:
    from timm.utils import AttentionExtract

    blocks = [m for m in network.modules() if hasattr(m, "fused_attn")]
    if not blocks or getattr(network, "cls_token", None) is None:
        return None
    for block in blocks:
        block.fused_attn = False  # type: ignore[assignment]
    maps = list(AttentionExtract(network, method="hook")(images).values())[-1]
    prefix = int(network.num_prefix_tokens)  # type: ignore[arg-type]
    of_class = maps[:, :, 0, prefix:]
    side = round(of_class.shape[-1] ** 0.5)
    return of_class.unflatten(-1, (side, side)) if side * side == of_class.shape[-1] else None


def _resized(maps: Tensor, size: Any) -> Tensor:
    return F.interpolate(maps.float(), tuple(size), mode="bilinear")


def draw_maps(backbone: nn.Module, images: Tensor, file: Path) -> None:
    """Draw images in the first column, and maps of where the backbone looks next to them.

    Args:
        backbone: A timm network; it is not changed.
        images: The network's input, shape `[B, 3, S, S]`.
        file: The picture to write; its suffix gives the format.

    Raises:
        ValueError: If the last feature map has no two spatial dimensions.
    """
    from matplotlib.figure import Figure

    words, found = attention_maps(backbone, images)
    rows, columns = len(images), 1 + found.shape[1]
    figure = Figure(figsize=(1.6 * columns + 1, 1.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    shown = ((images - low) / (high - low)).permute(0, 2, 3, 1)
    for row, image, heat in zip(axes, shown, found, strict=True):
        row[0].imshow(image.cpu().numpy())
        for axis, one in zip(row[1:], heat, strict=True):
            axis.imshow(one.cpu().numpy(), cmap="magma")
        for axis in row:
            axis.set_axis_off()
    figure.suptitle(words)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
