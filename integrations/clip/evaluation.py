"""Accuracy and calibration of a zero-shot head on test sets."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from wmateacher.integrations.clip.model import Towers
from wmateacher.integrations.engine import processes, signals
from wmateacher.integrations.vision import accuracy
from wmateacher.integrations.vision.accuracy import Labelled, Scores

__all__ = ["Labelled", "LabelledImages", "Scorer", "Scores", "TestSet", "score", "score_set", "summarise"]

Scorer = Callable[[Towers, Tensor], Scores]
"""A function from towers and a head `[d, classes]` to their scores on one test set."""


class LabelledImages(Protocol):
    """Images with class indices, read one at a time; reading raises an OSError if an image is damaged."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Any, int]: ...

    def name(self, index: int) -> str:
        """Return the location of an image, for messages."""
        ...


class TestSet(Protocol):
    """A test set.

    Attributes:
        images: The images, with labels 0 ... C - 1 within the set.
        classes: The number of classes C.
    """

    @property
    def images(self) -> LabelledImages: ...  # noqa: D102

    @property
    def classes(self) -> int: ...  # noqa: D102

    @property
    def logits_of(self) -> Callable[[Tensor], Tensor]:
        """The function from a head's logits to logits of the set's classes, `[B, C]`."""
        ...


def score(towers: Towers, head: Tensor, batches: Labelled) -> Scores:
    """Classify images by `features @ head` and compare the answers with their labels.

    Args:
        towers: The model. It is evaluated in eval mode and returned to its mode.
        head: The head, `[d, classes]`, such as `zero_shot_head` returns.
        batches: The test set, all of it on every rank.

    Raises:
        ValueError: If the test set is empty.
    """
    return accuracy.score(
        towers, batches, head.shape[1], lambda images: towers.encode_image(images, normalize=True) @ head
    )


def score_set(
    towers: Towers,
    head: Tensor,
    test: TestSet,
    transform: Callable[[Any], Tensor],
    *,
    batch_size: int = 256,
    workers: int = 0,
) -> Scores:
    """Score a head on a test set of image files, among the set's classes.

    Images that cannot be read are left out, with a warning that counts them. Each process reads its part.

    Args:
        towers: The model, as in `score`.
        head: The head, `[d, classes]`; 1,000 classes for ImageNet's sets.
        test: The test set, such as `imagenet.load` returns.
        transform: A function from a PIL image to the towers' input, such as `open_clip.image_transform`
            returns.
        batch_size: Images per batch.
        workers: Worker processes that read images; 0 reads them in this process.

    Raises:
        ValueError: If no image can be read.
    """
    return accuracy.score(
        towers,
        _read(test.images, transform, batch_size, workers),
        test.classes,
        lambda images: test.logits_of(towers.encode_image(images, normalize=True) @ head),
        parts=True,
    )


def _read(
    photos: LabelledImages, transform: Callable[[Any], Tensor], batch_size: int, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of the images that can be read."""
    loader: DataLoader[Any] = DataLoader(
        _Readable(photos, transform),
        batch_sampler=_own_parts(len(photos), batch_size),
        num_workers=workers,
        worker_init_fn=signals.leave_to_main,
        collate_fn=_together,
        # Without a generator of its own the loader would draw from the global one.
        generator=torch.Generator(),
    )
    unreadable: list[int] = []
    for images, labels, failed in loader:
        unreadable += failed
        yield images, labels
    if unreadable:
        warnings.warn(
            f"{len(unreadable)} of {len(photos)} images cannot be read and are left out, such as "
            f"{photos.name(unreadable[0])}: get them again, the figures are of the others",
            stacklevel=2,
        )


def _own_parts(count: int, batch_size: int) -> list[list[int]]:
    """Return the indices of the images of each batch that this process reads."""
    batches = [range(first, min(first + batch_size, count)) for first in range(0, count, batch_size)]
    return [list(batch[processes.local_slice(len(batch))]) for batch in batches]


class _Readable(Dataset[Any]):
    """(image, label), or the index of an image that cannot be read."""

    def __init__(self, photos: LabelledImages, transform: Callable[[Any], Tensor]):
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
    """Return one record of a model's scores.

    Args:
        scores: The scores by test set.
        in_distribution: The name of the in-distribution set; all others are shifts.

    Returns:
        `id`, `ood` (the mean over shifts) and `ood_per_shift` in percent; `ece` and `ece_per_batch`, means
        over shifts; and `id_ece`. Without shifts the means are None.
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
