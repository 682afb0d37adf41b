"""Batches of image-text pairs, as the training loop consumes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from wmateacher.integrations.engine import processes

__all__ = ["Batch", "Pairing", "Sampling", "join", "own_parts"]

Sampling = Literal["epochs", "balanced"]
"""The way to draw batches: a new permutation each epoch, or all classes equally often."""
Pairing = Literal["once", "published"]
"""The way to pair: a caption for each image of a batch, or rows of a table of all pairs."""


class Batch(NamedTuple):
    """Image-text pairs.

    Attributes:
        images: Normalised images, float32 `[B, 3, H, W]`.
        tokens: Each distinct caption of the batch once, int64 `[U, L]`.
        caption: The row of `tokens` that belongs to each image, int64 `[B]`.
        labels: Class indices, int64 `[B]`, or None if the data has none.
        unreadable: The number of this process's images that were replaced because they cannot be read. None
            if images are not read from files.
    """

    images: Tensor
    tokens: Tensor
    caption: Tensor
    labels: Tensor | None = None
    unreadable: int | None = None

    def rows(self, rows: slice) -> Batch:
        """Return some of the pairs, with only the captions that they need."""
        distinct, caption = self.caption[rows].unique(return_inverse=True)
        labels = None if self.labels is None else self.labels[rows]
        return Batch(self.images[rows], self.tokens[distinct], caption, labels, self.unreadable)

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        labels = None if self.labels is None else move(self.labels)
        return Batch(move(self.images), move(self.tokens), move(self.caption), labels, self.unreadable)


def own_parts(batch: Callable[[int], Batch], first_step: int) -> Iterator[Batch]:
    """Yield this process's parts of the batches without end, from `first_step` on.

    Args:
        batch: Returns the batch of one step, with the pairs of all processes.
        first_step: The index of the first step.
    """
    step = first_step
    while True:
        whole = batch(step)
        yield whole if processes.is_single() else whole.rows(processes.local_slice(len(whole.images)))
        step += 1


def join(first: Batch, second: Batch) -> Batch:
    """Return one batch with the pairs of both, without labels."""
    counts = [b.unreadable for b in (first, second) if b.unreadable is not None]
    return Batch(
        torch.cat([first.images, second.images]),
        torch.cat([first.tokens, second.tokens]),
        torch.cat([first.caption, second.caption + len(first.tokens)]),
        unreadable=sum(counts) if counts else None,
    )
