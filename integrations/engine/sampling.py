"""The images of each optimizer step, as a function of the seed and the step alone, so that runs resume."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["Balanced", "Epochs", "check_batch_size", "generator", "hold_out", "mix", "steps_per_epoch"]


def mix(*stream: int) -> int:
    """Return one seed for a tuple of numbers. It has 32 bits, since torch's CPU generator reads no more."""
    return int(np.random.SeedSequence(stream).generate_state(1)[0])


def generator(*stream: int) -> torch.Generator:
    """Return a generator for a tuple of numbers, such as (seed, kind, step)."""
    return torch.Generator().manual_seed(mix(*stream))


def check_batch_size(batch_size: int, count: int, what: str) -> None:
    """Check that a batch can be drawn.

    Raises:
        ValueError: If the batch is empty or larger than the data.
    """
    if not 1 <= batch_size <= count:
        raise ValueError(f"batch_size must be between 1 and the {count} {what}, got {batch_size}")


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Return the number of steps in which all of `count` images are seen; the remainder is a step too."""
    return -(-count // batch_size)


def hold_out(labels: Tensor, count: int) -> Tensor:
    """Choose `count` images to hold out, with the classes in the same proportions; the same ones every time.

    The last image of a class is held out only if there are no others.

    Args:
        labels: The class of every image, int64 `[N]`.
        count: The number of images to hold out.

    Returns:
        Whether each image is held out, bool `[N]`.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    shuffled = labels[order]
    # Relative ranks within each class: taking the lowest keeps the classes in proportion.
    rank = torch.empty(len(labels))
    for label in shuffled.unique():
        members = (shuffled == label).nonzero()[:, 0]
        rank[members] = (torch.arange(len(members)) + 0.5) / len(members)
        rank[members[-1]] += 1
    out = torch.zeros(len(labels), dtype=torch.bool)
    out[order[rank.argsort(stable=True)[:count]]] = True
    return out


class Epochs:
    """Choose the images of each step by a new permutation in every epoch.

    Args:
        count: The number of images.
        batch_size: Images per step.
        seed: The seed of the permutations.
        what: The name of the images in messages.
        fill: Whether the remainder of an epoch is a step too, filled up with the first images of the epoch.
            Otherwise it is left out.

    Attributes:
        steps_per_epoch: The number of steps in a pass over the images.

    Raises:
        ValueError: If a batch is larger than the data.
    """

    def __init__(
        self, count: int, batch_size: int, seed: int, what: str = "training images", *, fill: bool = False
    ):
        check_batch_size(batch_size, count, what)
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.steps_per_epoch = steps_per_epoch(count, batch_size) if fill else count // batch_size
        self._epoch, self._order = -1, torch.empty(0)

    def __call__(self, step: int) -> Tensor:
        """Return the indices of a step's images, int64 `[batch_size]`."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            order = torch.randperm(self.count, generator=generator(self.seed, 0, epoch))
            missing = max(0, self.steps_per_epoch * self.batch_size - self.count)
            self._order = torch.cat([order, order[:missing]])
            self._epoch = epoch
        return self._order[position * self.batch_size :][: self.batch_size]


class Balanced:
    """Choose the images of each step so that all classes are drawn equally often.

    Classes are drawn without replacement, and an image of each at random. In a batch with at most as many
    images as there are classes, no two images share a class, so no image is a false negative of another in a
    contrastive loss.

    Args:
        labels: The class of every image, int64 `[N]`.
        batch_size: Images per step.
        seed: The seed of the draws.
        what: The name of the images in messages.

    Attributes:
        steps_per_epoch: The number of steps in which as many images are drawn as there are, rounded up.

    Raises:
        ValueError: If a batch is larger than the data.
    """

    def __init__(self, labels: Tensor, batch_size: int, seed: int, what: str = "training images"):
        check_batch_size(batch_size, len(labels), what)
        self.batch_size, self.seed = batch_size, seed
        self.steps_per_epoch = steps_per_epoch(len(labels), batch_size)
        self._members = labels.argsort(stable=True)
        self._sizes = labels.unique(return_counts=True)[1]
        self._first = self._sizes.cumsum(0) - self._sizes

    def __call__(self, step: int) -> Tensor:
        """Return the indices of a step's images, int64 `[batch_size]`."""
        random = generator(self.seed, 0, step)
        classes = len(self._sizes)
        rounds = [torch.randperm(classes, generator=random) for _ in range(-(-self.batch_size // classes))]
        drawn = torch.cat(rounds)[: self.batch_size]
        within = torch.rand(self.batch_size, generator=random, dtype=torch.float64) * self._sizes[drawn]
        return self._members[self._first[drawn] + within.long()]
