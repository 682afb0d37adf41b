"""The images of evaluation, and the accuracy of k-NN and linear classifiers on features of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from wmateacher.integrations.dino import crops
from wmateacher.integrations.engine import processes
from wmateacher.integrations.engine.sampling import generator
from wmateacher.integrations.vision import images, probes
from wmateacher.integrations.vision.digits import Domain, Source, Split

__all__ = ["DrawnViews", "Features", "PhotoViews", "Views", "features", "pixels", "scores", "validation"]

_BATCH = 500
Labelled = Iterator[tuple[Tensor, Tensor]]
"""Batches of images `[B, 3, S, S]` and labels `[B]`."""
Features = Callable[[str], tuple[Tensor, Tensor]]
"""From `"train"`, `"val"` or `"test"` to features `[N, D]` and labels `[N]`."""


class Views(Protocol):
    """Images that are the same at every evaluation."""

    def batches(self, part: str, raw: bool = False) -> Labelled:
        """Yield images `[B, 3, S, S]` and labels.

        Args:
            part: `"train"`, `"val"` or `"test"`.
            raw: Whether to leave out the normalisation.
        """
        ...


class DrawnViews:
    """Grey images, each drawn once.

    Args:
        source: The data set.
        train: The training images in use.
        domain: The domain that the images are drawn in.
        drawing: Height and width of the drawings, in pixels.
        size: Height and width of the network's input, in pixels.
        most: The largest number of images of each part.
    """

    def __init__(self, source: Source, train: Split, domain: Domain, drawing: int, size: int, most: int):
        self._splits = {"train": train, "val": source.val, "test": source.test}
        self._domain, self._drawing, self._size, self._most = domain, drawing, size, most
        self._drawn: dict[str, tuple[Tensor, Tensor]] = {}

    def batches(self, part: str, raw: bool = False) -> Labelled:
        """Yield batches as in `Views`."""
        if part not in self._drawn:
            split = self._splits[part].subset(self._most)
            whole = self._domain.draw(split, self._drawing, generator(0, len(part)))
            small = F.interpolate(whole, (self._size, self._size), mode="bilinear", antialias=True)
            self._drawn[part] = small, split.labels
        pixels, labels = self._drawn[part]
        for some, theirs in zip(pixels.split(_BATCH), labels.split(_BATCH), strict=True):
            yield some if raw else crops.normalise(some), theirs


class PhotoViews:
    """Photographs, cropped to their centre.

    Args:
        photos: The data set.
        size: Height and width of the network's input, in pixels.
        workers: The number of processes that read images.
    """

    def __init__(self, photos: images.Images, size: int, workers: int):
        self._parts: dict[str, Dataset[Any]] = {
            "train": photos.train, "val": photos.val, "test": photos.test,
        }  # fmt: skip
        self._view, self._workers = crops.photo_view(size), workers

    def batches(self, part: str, raw: bool = False) -> Labelled:
        """Yield batches as in `Views`."""
        viewed = images.Viewed(self._parts[part], self._view)
        yield from DataLoader(
            viewed, batch_size=_BATCH, num_workers=self._workers, generator=torch.Generator()
        )


def pixels(views: Views, raw: bool) -> Features:
    """Return the pixels as features."""

    def of(part: str) -> tuple[Tensor, Tensor]:
        seen, labels = zip(*views.batches(part, raw), strict=True)
        return torch.cat(seen).flatten(1), torch.cat(labels)

    return of


def features(views: Views, backbone: nn.Module, device: torch.device) -> Features:
    """Return the features of a backbone in eval mode; its mode is restored. All processes share the work."""

    @torch.no_grad()
    def of(part: str) -> tuple[Tensor, Tensor]:
        training = backbone.training
        backbone.eval()
        found, labels = [], []
        for seen, theirs in views.batches(part):
            found.append(
                processes.all_gather_rows(backbone(processes.shard_rows(seen).to(device))).float().cpu()
            )
            labels.append(theirs)
        backbone.train(training)
        return torch.cat(found), torch.cat(labels)

    return of


def scores(of: Features) -> dict[str, float]:
    """Return the accuracies on test images, in percent, of k-NN and of a linear classifier."""
    train, test = of("train"), of("test")
    return {"knn": probes.knn_accuracy(*train, *test), "linear": probes.linear_accuracy(*train, *test)}


def validation(of: Features) -> float:
    """Return the k-NN accuracy on validation images, in percent."""
    return probes.knn_accuracy(*of("train"), *of("val"))
