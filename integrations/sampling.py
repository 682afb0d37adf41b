"""What each optimizer step sees, as a function of the seed and the step alone: so that runs resume."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def mix(*stream: int) -> int:
    """One seed for a tuple of numbers, of 32 bits: torch's CPU generator reads no more of it."""
    return int(np.random.SeedSequence(stream).generate_state(1)[0])


def generator(*stream: int) -> torch.Generator:
    """A generator of its own for every tuple of numbers, such as (seed, kind, step)."""
    return torch.Generator().manual_seed(mix(*stream))


class Epochs:
    """The images of each step: a new permutation an epoch, its remainder left out.

    Args:
        count: Number of images.
        batch_size: Images a step.
        seed: Of the permutations.
        what: Name of the images in messages.

    Attributes:
        steps_per_epoch: Steps in a pass over the images.

    Raises:
        ValueError: A batch is larger than the data.
    """

    def __init__(self, count: int, batch_size: int, seed: int, what: str = "training images"):
        if not 1 <= batch_size <= count:
            raise ValueError(f"batch_size must be between 1 and the {count} {what}, got {batch_size}")
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.steps_per_epoch = count // batch_size
        self._epoch, self._order = -1, torch.empty(0)

    def __call__(self, step: int) -> Tensor:
        """The indices of a step's images, int64 `[batch_size]`."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = torch.randperm(self.count, generator=generator(self.seed, 0, epoch))
            self._epoch = epoch
        return self._order[position * self.batch_size :][: self.batch_size]
