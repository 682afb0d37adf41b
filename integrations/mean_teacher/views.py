"""Weak and strong views of images, by torchvision's transforms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

__all__ = ["Plain", "Weak", "WeakAndStrong"]


class Plain:
    """Resize an image for evaluation, without distortion.

    Args:
        size: Height and width, in pixels.
    """

    def __init__(self, size: int):
        self.pipeline = v2.Compose([*_read(size), *_finish()])

    def __call__(self, image: Any) -> Tensor:
        """Return the view of an image, float32 `[C, size, size]`."""
        return self.pipeline(image)


class Weak:
    """Shift an image by up to an eighth of its size, and mirror it at random if `flip`.

    Args:
        size: Height and width, in pixels.
        flip: Whether to mirror half of the images: right for photographs, wrong for digits.
    """

    def __init__(self, size: int, flip: bool):
        self.pipeline = v2.Compose([*_shift(size, flip), *_finish()])

    def __call__(self, image: Any) -> Tensor:
        """Return the view of an image, float32 `[C, size, size]`."""
        return self.pipeline(image)


class WeakAndStrong:
    """Return a weak view and an independent strong one: RandAugment, then an erased patch, as in FixMatch.

    Args:
        size: Height and width, in pixels.
        flip: Whether to mirror half of the images.
        operations: The number of RandAugment's operations on each image.
        magnitude: The magnitude of the operations, 0 to 30.
    """

    def __init__(self, size: int, flip: bool, operations: int = 2, magnitude: int = 9):
        self.weak = Weak(size, flip)
        bilinear = v2.InterpolationMode.BILINEAR
        self.strong = v2.Compose(
            [
                *_shift(size, flip),
                v2.RandAugment(operations, magnitude, interpolation=bilinear),
                *_finish(),
                v2.RandomErasing(1.0, (0.02, 0.2)),
            ]
        )

    def __call__(self, image: Any) -> tuple[Tensor, Tensor]:
        """Return both views of an image, float32 `[C, size, size]` each."""
        return self.weak(image), self.strong(image)


def _read(size: int) -> list[v2.Transform]:
    return [v2.ToImage(), v2.Resize((size, size), antialias=True)]


def _shift(size: int, flip: bool) -> list[v2.Transform]:
    steps = [*_read(size), v2.RandomCrop(size, padding=size // 8, padding_mode="edge")]
    return [*steps, v2.RandomHorizontalFlip()] if flip else steps


def _finish() -> list[v2.Transform]:
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.5,), (0.25,))]
