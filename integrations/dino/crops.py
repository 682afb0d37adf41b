"""Global and local crops of every image, as the student and the teacher see them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import roi_align
from torchvision.transforms import v2

from wmateacher.integrations.dino.recipes import Crops, Range
from wmateacher.integrations.engine import processes
from wmateacher.integrations.engine.sampling import Epochs, generator
from wmateacher.integrations.vision.digits import Domain, Split
from wmateacher.integrations.vision.images import Images, Views

__all__ = ["DrawnCrops", "PhotoCrops", "cut", "normalise", "photo_view"]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""The mean and the standard deviation of ImageNet's pixels in [0, 1], for each channel."""


def normalise(images: Tensor) -> Tensor:
    """Normalise drawings `[B, 3, H, W]` to mean 0 and deviation 1 in every channel of every image.

    Otherwise an untrained network sees little but the random colours.
    """
    centred = images - images.mean((-2, -1), keepdim=True)
    return centred / (centred.std((-2, -1), keepdim=True) + 0.05)


class DrawnCrops:
    """A `loop.Stream` of crops of grey images, drawn in a domain of random colours.

    A crop is cut either from the drawing that all crops of its image share, or from its own drawing.

    Args:
        split: The images. A domain of random colours does not use their labels.
        domain: The domain that the images are drawn in.
        size: Height and width of the drawings, in pixels.
        crops: The sizes of the crops.
        batch_size: Images per step.
        seed: The seed of the order, the drawings and the crops.
        redraw: First and last step of a ramp, over which the share of crops with their own drawing rises from
            0 to 1; (0, 0) for all crops from the start.

    Raises:
        ValueError: If a batch is larger than the data, a crop is larger than the drawing, or the domain's
            colours tell the label.
    """

    def __init__(
        self,
        split: Split,
        domain: Domain,
        size: int,
        crops: Crops,
        batch_size: int,
        seed: int,
        redraw: tuple[int, int] = (0, 0),
    ):
        largest = max(crops.global_size, crops.local_size)
        if largest > size:
            raise ValueError(
                f"crops of {largest} pixels are larger than the images of {size}: lower global_size and "
                "local_size, or draw larger images (image_size)"
            )
        if "random" not in (domain.ink, domain.paper) and domain.ink[0] != domain.ink[1]:
            raise ValueError("the domain's colours tell the label; give ink='random'")
        self.split, self.domain, self.size, self.crops, self.seed = split, domain, size, crops, seed
        self.redraw = redraw
        self.epochs = Epochs(len(split), batch_size, seed)

    def __call__(self, first_step: int) -> Iterator[list[Tensor]]:
        """Yield batches from `first_step` on, without end."""
        step = first_step
        while True:
            yield self.batch(step)
            step += 1

    def batch(self, step: int) -> list[Tensor]:
        """Return this process's crops of one step, each `[B, 3, H, W]`, the global ones first."""
        chosen = self.epochs(step)
        part = Split(self.split.images[chosen], self.split.labels[chosen])
        random = generator(self.seed, 1, step)
        share = self.redrawn_at(step)
        # Drawing is not free: the shared drawing is left out when no crop is cut from it.
        shared = None if share == 1 else self.domain.draw(part, self.size, random)
        cuts = []
        for size, scale in self.crops.sizes:
            drawing = self.domain.draw(part, self.size, random)
            if shared is not None:
                redrawn = torch.rand(len(part), 1, 1, 1, generator=random) < share
                drawing = torch.where(redrawn, drawing, shared)
            cuts.append(cut(drawing, size, scale, random))
        return [normalise(processes.shard_rows(crop)) for crop in cuts]

    def redrawn_at(self, step: int) -> float:
        """Return the share of crops with their own drawing at a step."""
        first, last = self.redraw
        return 1.0 if step >= last else max(0.0, (step - first) / (last - first))


def cut(images: Tensor, size: int, scale: Range, random: torch.Generator) -> Tensor:
    """Cut one square crop from each image, at a random place, and resize it.

    Args:
        images: The images, shape `[B, 3, S, S]`.
        size: Height and width of the result, in pixels.
        scale: The range of the share of the image's area that the crop covers.
        random: The generator for all random numbers.

    Returns:
        The crops, shape `[B, 3, size, size]`.
    """
    count, whole = len(images), images.shape[-1]
    area = scale[0] + (scale[1] - scale[0]) * torch.rand(count, generator=random)
    side = whole * area.sqrt()
    corner = (whole - side)[:, None] * torch.rand(count, 2, generator=random)
    boxes = torch.cat([torch.arange(count)[:, None], corner, corner + side[:, None]], 1)
    return roi_align(images, boxes, (size, size), aligned=True)


class PhotoCrops:
    """A `loop.Stream` of crops of photographs, distorted as in BYOL and DINO.

    Flip, colour jitter, grey, blur and solarisation have the probabilities of Caron et al. 2021.

    Args:
        images: The photographs.
        crops: The sizes of the crops.
        batch_size: Images per step.
        seed: The seed of the order, the crops and the distortions.
        workers: The number of processes that prepare batches.

    Raises:
        ValueError: If a batch is larger than the data, or a crop is larger than the first image.
    """

    def __init__(self, images: Images, crops: Crops, batch_size: int, seed: int, workers: int = 0):
        first = v2.functional.to_image(images.train[0][0])
        smallest = min(first.shape[-2:])
        if max(crops.global_size, crops.local_size) > smallest:
            raise ValueError(
                f"crops of {max(crops.global_size, crops.local_size)} pixels are larger than the images "
                f"(the first has {smallest}): lower global_size and local_size"
            )
        self._views = Views(images.train, _Distort(crops), batch_size, seed, workers=workers)

    def __call__(self, first_step: int) -> Iterator[list[Tensor]]:
        """Yield batches from `first_step` on, without end."""
        for views, _ in self._views(first_step):
            yield list(views)


class _Distort:
    """Return the crops of an image. This is a class so that it can be sent to workers."""

    def __init__(self, crops: Crops):
        solar = ((0.0, 1.0), (0.2, 0.1), *[(0.0, 0.5)] * crops.local_count)
        self.pipelines = [
            _photo_pipeline(size, scale, blur, solarize)
            for (size, scale), (solarize, blur) in zip(crops.sizes, solar, strict=True)
        ]

    def __call__(self, image: Any) -> tuple[Tensor, ...]:
        return tuple(pipeline(image) for pipeline in self.pipelines)


def _photo_pipeline(size: int, scale: Range, blur: float, solarize: float) -> v2.Transform:
    jitter = v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
    kernel = max(3, size // 20 * 2 + 1)
    return v2.Compose(
        [
            v2.ToImage(),
            v2.RGB(),
            v2.RandomResizedCrop(
                size, scale=scale, interpolation=v2.InterpolationMode.BICUBIC, antialias=True
            ),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([jitter], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], p=blur),
            v2.RandomSolarize(128, p=solarize),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


def photo_view(size: int) -> v2.Transform:
    """Return the transform of photographs in evaluation: the undistorted centre."""
    return v2.Compose(
        [
            v2.ToImage(),
            v2.RGB(),
            v2.Resize(round(size * 256 / 224), interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.CenterCrop(size),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
