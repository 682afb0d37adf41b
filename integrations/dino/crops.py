"""Several crops of every image, large and small: what the student and the teacher see."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import roi_align
from torchvision.transforms import v2

from wmateacher.integrations.engine import processes
from wmateacher.integrations.engine.sampling import Epochs, generator
from wmateacher.integrations.vision.digits import Domain, Split
from wmateacher.integrations.vision.images import Images, Views

Range = tuple[float, float]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, per channel, of pixels in [0, 1]."""


@dataclass(frozen=True)
class Crops:
    """How many crops of which sizes. The defaults are those of Caron et al. 2021 for 224 pixels.

    Attributes:
        global_size: Height and width of the two global crops, in pixels.
        local_size: Of the local ones.
        local_count: Number of local crops.
        global_scale: Range of their share of the image's area.
        local_scale: The same for the local ones.

    Raises:
        ValueError: A size or a scale makes no crop.
    """

    global_size: int = 224
    local_size: int = 96
    local_count: int = 8
    global_scale: Range = (0.4, 1.0)
    local_scale: Range = (0.05, 0.4)

    def __post_init__(self) -> None:
        for name, low in (("global_size", 1), ("local_size", 1), ("local_count", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        for name in ("global_scale", "local_scale"):
            low_, high = getattr(self, name)
            if not 0 < low_ <= high <= 1:
                raise ValueError(f"{name} must be a range within (0, 1], got {getattr(self, name)}")

    @property
    def sizes(self) -> list[tuple[int, Range]]:
        """Size and scale of each crop, the two global ones first."""
        return [(self.global_size, self.global_scale)] * 2 + [
            (self.local_size, self.local_scale)
        ] * self.local_count


def normalise(images: Tensor) -> Tensor:
    """Drawings to mean 0 and deviation 1 in each image's each channel: `[B, 3, H, W]`.

    Random colours are most of what an untrained network sees otherwise.
    """
    centred = images - images.mean((-2, -1), keepdim=True)
    return centred / (centred.std((-2, -1), keepdim=True) + 0.05)


class DrawnCrops:
    """A `loop.Stream` of crops of grey images, drawn in a domain of random colours.

    A crop is cut from a drawing that all crops of its image share, or drawn anew.

    Args:
        split: Images; their labels are not looked at by a domain of random colours.
        domain: How they are drawn.
        size: Of the drawing that crops are cut from, in pixels.
        crops: How they are cut.
        batch_size: Images a step.
        seed: Of order, drawings and crops.
        redraw: Steps between which the share of crops drawn anew goes from 0 to 1; (0, 0): all.

    Raises:
        ValueError: A batch is larger than the data, a crop larger than the drawing, or the domain's
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
        """Batches without end from `first_step` on."""
        step = first_step
        while True:
            yield self.batch(step)
            step += 1

    def batch(self, step: int) -> list[Tensor]:
        """This process's crops of one step, each `[B, 3, H, W]`, the global ones first."""
        chosen = self.epochs(step)
        part = Split(self.split.images[chosen], self.split.labels[chosen])
        random = generator(self.seed, 1, step)
        shared = self.domain.draw(part, self.size, random)
        cuts = []
        for size, scale in self.crops.sizes:
            own = self.domain.draw(part, self.size, random)
            redrawn = torch.rand(len(part), 1, 1, 1, generator=random) < self.redrawn_at(step)
            cuts.append(cut(torch.where(redrawn, own, shared), size, scale, random))
        return [normalise(processes.shard_rows(crop)) for crop in cuts]

    def redrawn_at(self, step: int) -> float:
        """The share of crops that are drawn anew at a step."""
        first, last = self.redraw
        return 1.0 if step >= last else max(0.0, (step - first) / (last - first))


def cut(images: Tensor, size: int, scale: Range, random: torch.Generator) -> Tensor:
    """One square crop of each image: a random share `scale` of its area, anywhere, resized.

    Args:
        images: `[B, 3, S, S]`.
        size: Height and width of the result, in pixels.
        scale: Range of the share of the area.
        random: Source of all randomness.

    Returns:
        `[B, 3, size, size]`.
    """
    count, whole = len(images), images.shape[-1]
    area = scale[0] + (scale[1] - scale[0]) * torch.rand(count, generator=random)
    side = whole * area.sqrt()
    corner = (whole - side)[:, None] * torch.rand(count, 2, generator=random)
    boxes = torch.cat([torch.arange(count)[:, None], corner, corner + side[:, None]], 1)
    return roi_align(images, boxes, (size, size), aligned=True)


class PhotoCrops:
    """A `loop.Stream` of crops of photographs, distorted as in BYOL and DINO.

    Flip, colour jitter, grey, blur and solarisation with the probabilities of Caron et al. 2021.

    Args:
        images: Where to read.
        crops: How they are cut.
        batch_size: Images a step.
        seed: Of order, crops and distortions.
        workers: Processes that prepare batches.

    Raises:
        ValueError: A batch is larger than the data, or a crop larger than the first image.
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
        """Batches without end from `first_step` on."""
        for views, _ in self._views(first_step):
            yield list(views)


class _Distort:
    """An image to its crops; a class, so that workers can receive it."""

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
    """How photographs are looked at in evaluation: the middle, not distorted."""
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
