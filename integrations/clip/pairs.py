"""Image-text batches: what the training loop eats, and the digits drawn with captions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from wmateacher.integrations.clip.towers import Tokenizer
from wmateacher.integrations.digits import Domain, Split


class Batch(NamedTuple):
    """Image-text pairs.

    Attributes:
        images: float32 `[B, 3, H, W]`, normalised.
        tokens: int64 `[U, L]`, each distinct caption of the batch once.
        caption: int64 `[B]`, the row of `tokens` that belongs to each image.
    """

    images: Tensor
    tokens: Tensor
    caption: Tensor


Stream = Callable[[int], Iterator[Batch]]
"""Batches from a given optimizer step on; the same step always gives the same batch."""

MEAN, STD = 0.5, 0.25
"""Normalisation of drawn digits, on every channel."""


def normalise(images: Tensor) -> Tensor:
    """Pixels in [0, 1] to the range that the small towers are trained on."""
    return (images - MEAN) / STD


class DrawnPairs:
    """Digits drawn anew in a domain at every step, each with a random template's caption.

    A `Stream`: what step s holds depends on the seed and s alone, so a run resumes in its data where it
    stopped.

    Args:
        split: Images and labels.
        domain: How they are drawn.
        classes: Class names.
        templates: Captions with a `{}`.
        tokenizer: Of the towers.
        size: Image size in pixels.
        batch_size: Pairs a step.
        seed: Of order, drawing and captions.

    Raises:
        ValueError: The split has fewer images than a batch.
    """

    def __init__(
        self,
        split: Split,
        domain: Domain,
        classes: Sequence[str],
        templates: Sequence[str],
        tokenizer: Tokenizer,
        *,
        size: int,
        batch_size: int,
        seed: int,
    ):
        if not 1 <= batch_size <= len(split):
            raise ValueError(
                f"batch_size must be between 1 and the {len(split)} training images, got {batch_size}"
            )
        self.split, self.domain = split, domain
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.captions = tokenizer([t.format(c) for c in classes for t in templates])
        self.templates = len(templates)
        self.steps_per_epoch = len(split) // batch_size

    def __call__(self, first_step: int) -> Iterator[Batch]:
        """Batches without end from `first_step` on."""
        step = first_step
        while True:
            yield self.batch(step)
            step += 1

    def batch(self, step: int) -> Batch:
        """The batch of one step; epochs pass over a new permutation each, the remainder left out."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = torch.randperm(len(self.split), generator=self._generator(0, epoch))
        chosen = order[position * self.batch_size :][: self.batch_size]
        part = Split(self.split.images[chosen], self.split.labels[chosen])
        generator = self._generator(1, step)
        images = normalise(self.domain.draw(part, self.size, generator))
        template = torch.randint(self.templates, (len(part),), generator=generator)
        caption = part.labels * self.templates + template
        distinct, which = caption.unique(return_inverse=True)
        return Batch(images, self.captions[distinct], which)

    def _generator(self, *stream: int) -> torch.Generator:
        # torch's CPU generator reads only the low 32 bits of a seed: mix, never shift.
        mixed = np.random.SeedSequence([self.seed, *stream]).generate_state(1)[0]
        return torch.Generator().manual_seed(int(mixed))
