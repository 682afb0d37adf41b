"""Accuracy and calibration of a zero-shot head, over any number of test sets."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from wmateacher.integrations.clip.data.imagenet import Photos, Test
from wmateacher.integrations.clip.model import Towers
from wmateacher.integrations.engine import processes, signals
from wmateacher.integrations.vision import accuracy
from wmateacher.integrations.vision.accuracy import Labelled, Scores

Scorer = Callable[[Towers, Tensor], Scores]
"""Towers and a head `[d, classes]` to their scores on one test set."""


def score(towers: Towers, head: Tensor, batches: Labelled) -> Scores:
    """Classify images by `features @ head` and compare with their labels.

    Args:
        towers: The model; evaluated in eval mode, its mode restored.
        head: `[d, classes]`, as `zero_shot_head` gives.
        batches: The test set, whole on every rank.

    Raises:
        ValueError: The test set is empty.
    """
    return accuracy.score(
        towers, batches, head.shape[1], lambda images: towers.encode_image(images, normalize=True) @ head
    )


def score_set(
    towers: Towers,
    head: Tensor,
    test: Test,
    transform: Callable[[Any], Tensor],
    *,
    batch_size: int = 256,
    workers: int = 0,
) -> Scores:
    """Score a head of ImageNet's 1,000 classes on a set that `imagenet.load` gives, among the set's classes.

    Images that cannot be read are left out, with a warning that counts them. Each process reads its part.

    Args:
        towers: As in `score`.
        head: `[d, 1000]`.
        test: The set.
        transform: A PIL image to what the towers take, such as `open_clip.image_transform` gives.
        batch_size: Images at a time.
        workers: Processes that read images; 0: this one.

    Raises:
        ValueError: No image can be read.
    """
    return accuracy.score(
        towers,
        _read(test.images, transform, batch_size, workers),
        test.classes,
        lambda images: test.answers(towers.encode_image(images, normalize=True) @ head),
        parts=True,
    )


def _read(
    photos: Photos, transform: Callable[[Any], Tensor], batch_size: int, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of what can be read."""
    loader: DataLoader[Any] = DataLoader(
        _Readable(photos, transform),
        batch_sampler=_own_parts(len(photos), batch_size),
        num_workers=workers,
        worker_init_fn=signals.leave_to_main,
        collate_fn=_together,
        generator=torch.Generator(),  # else it would draw from the global one
    )
    unreadable: list[int] = []
    for images, labels, failed in loader:
        unreadable += failed
        yield images, labels
    if unreadable:
        warnings.warn(
            f"{len(unreadable)} of {len(photos)} images cannot be read and are left out, such as "
            f"{photos.files[unreadable[0]]}: get them again, the published figures have them",
            stacklevel=2,
        )


def _own_parts(count: int, batch_size: int) -> list[list[int]]:
    """The indices of each batch's images that this process reads."""
    batches = [range(first, min(first + batch_size, count)) for first in range(0, count, batch_size)]
    return [list(batch[processes.local_slice(len(batch))]) for batch in batches]


class _Readable(Dataset[Any]):
    """(image, label), or the index of an image that cannot be read."""

    def __init__(self, photos: Photos, transform: Callable[[Any], Tensor]):
        self.photos, self.transform = photos, transform

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | int:
        try:
            image, label = self.photos[index]
        except OSError:
            return index
        return self.transform(image), label


def _together(items: list[Any]) -> tuple[Tensor, Tensor, list[int]]:
    read = [item for item in items if not isinstance(item, int)]
    images, labels = default_collate(read) if read else (torch.empty(0), torch.empty(0, dtype=torch.int64))
    return images, labels, [item for item in items if isinstance(item, int)]


def summarise(scores: Mapping[str, Scores], in_distribution: str = "id") -> dict[str, object]:
    """One record of a model's scores: ID, mean and single shifts, ECE.

    Returns:
        `id`, `ood` (mean over the shifts) and `ood_per_shift` in percent; `ece` and `ece_per_batch`,
        means over the shifts; `id_ece`. Means are None where there are no shifts.
    """
    shifts = {name: s for name, s in scores.items() if name != in_distribution}

    def mean(values: list[float]) -> float | None:
        return sum(values) / len(values) if values else None

    return {
        "id": scores[in_distribution].accuracy,
        "ood": mean([s.accuracy for s in shifts.values()]),
        "ood_per_shift": {name: s.accuracy for name, s in shifts.items()},
        "ece": mean([s.ece for s in shifts.values()]),
        "ece_per_batch": mean([s.ece_per_batch for s in shifts.values()]),
        "id_ece": scores[in_distribution].ece,
    }
