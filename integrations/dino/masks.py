"""Blocks of patches that are hidden from the student, for iBOT's masked-patch term."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from wmateacher.integrations.dino.recipes import Range

__all__ = ["Masks", "draw_blocks"]

_ASPECTS = (0.3, 1 / 0.3)
"""The range of height over width of a block (Bao et al. 2022, algorithm 1)."""


class Masks(NamedTuple):
    """The hidden patches of N images.

    Attributes:
        hidden: Whether a patch is hidden, bool `[N, P]`.
        positions: The indices of the hidden patches among the N P patches, int64 `[H]`.
        weights: The weight of each hidden patch in the loss: 1 / (N n) for an image with n hidden patches,
            float32 `[H]`.
    """

    hidden: Tensor
    positions: Tensor
    weights: Tensor

    @classmethod
    def of(cls, hidden: Tensor) -> Masks:
        """Return the masks of hidden patches `[N, P]` on the CPU, so that no device waits."""
        positions = hidden.flatten().nonzero().squeeze(1)
        share = 1.0 / (len(hidden) * hidden.sum(1).clamp_min(1))
        return cls(hidden, positions, share[positions // hidden.shape[1]])

    def to(self, device: torch.device) -> Masks:
        """Return the masks on a device."""
        return Masks(*(part.to(device, non_blocking=True) for part in self))


def draw_blocks(
    count: int, grid: tuple[int, int], ratio: Range, probability: float, random: torch.Generator
) -> Tensor:
    """Hide blocks of patches in a share of the images (Zhou et al. 2022, section 3; Bao et al. 2022).

    The number of images with hidden patches is `probability` of them, at least one. The share of hidden
    patches of an image is drawn from `ratio`, and reached with rectangles of random sizes.

    Args:
        count: The number N of images.
        grid: The numbers of rows and columns of patches; P is their product.
        ratio: The range of the share of hidden patches.
        probability: The share of the images with hidden patches.
        random: The generator for all random numbers.

    Returns:
        Whether a patch is hidden, bool `[N, P]`.
    """
    masks = torch.zeros(count, *grid, dtype=torch.bool)
    chosen = torch.randperm(count, generator=random)[: max(1, round(probability * count))]
    low, high = (share * masks[0].numel() for share in ratio)
    for image in chosen.tolist():
        wanted = max(1, round(low + (high - low) * torch.rand((), generator=random).item()))
        _hide(masks[image], wanted, random)
    return masks.flatten(1)


def _hide(mask: Tensor, wanted: int, random: torch.Generator) -> None:
    """Hide `wanted` patches of `[rows, columns]` in blocks."""
    rows, columns = mask.shape
    while (missing := wanted - int(mask.sum())) > 0:
        size, shape, top, left = torch.rand(4, generator=random).tolist()
        aspect = math.exp(math.log(_ASPECTS[0]) + shape * math.log(_ASPECTS[1] / _ASPECTS[0]))
        area = 1 + size * (missing - 1)
        height = min(rows, max(1, round(math.sqrt(area * aspect))))
        width = min(columns, max(1, round(math.sqrt(area / aspect))))
        first, start = int(top * (rows - height + 1)), int(left * (columns - width + 1))
        block = mask[first : first + height, start : start + width]
        # The last block is cut, so that exactly the wanted number is hidden.
        new = (~block).nonzero()[:missing]
        block[new[:, 0], new[:, 1]] = True
