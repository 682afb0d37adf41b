"""Image-text batches: what the training loop eats, and the digits drawn with captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wmateacher.integrations.clip.model import Tokenizer
from wmateacher.integrations.engine import processes
from wmateacher.integrations.engine.sampling import Epochs, generator
from wmateacher.integrations.vision.digits import Domain, Split


class Batch(NamedTuple):
    """Image-text pairs.

    Attributes:
        images: float32 `[B, 3, H, W]`, normalised.
        tokens: int64 `[U, L]`, each distinct caption of the batch once.
        caption: int64 `[B]`, the row of `tokens` that belongs to each image.
        labels: int64 `[B]`, the classes, where there are any.
        unreadable: How many images of this process others stand in for; None: images are not read.
    """

    images: Tensor
    tokens: Tensor
    caption: Tensor
    labels: Tensor | None = None
    unreadable: int | None = None

    def rows(self, chosen: slice) -> Batch:
        """Some of the pairs, with the captions that they need."""
        distinct, caption = self.caption[chosen].unique(return_inverse=True)
        labels = None if self.labels is None else self.labels[chosen]
        return Batch(self.images[chosen], self.tokens[distinct], caption, labels, self.unreadable)

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""

        def there(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        labels = None if self.labels is None else there(self.labels)
        return Batch(there(self.images), there(self.tokens), there(self.caption), labels, self.unreadable)


def joined(first: Batch, second: Batch) -> Batch:
    """The pairs of both in one batch, without labels."""
    counts = [b.unreadable for b in (first, second) if b.unreadable is not None]
    return Batch(
        torch.cat([first.images, second.images]),
        torch.cat([first.tokens, second.tokens]),
        torch.cat([first.caption, second.caption + len(first.tokens)]),
        unreadable=sum(counts) if counts else None,
    )


MEAN, STD = 0.5, 0.25
"""Normalisation of drawn digits, on every channel."""


def normalise(images: Tensor) -> Tensor:
    """Pixels in [0, 1] to the range that the small towers are trained on."""
    return (images - MEAN) / STD


class DrawnPairs:
    """Digits drawn anew in a domain at every step, each with a random template's caption.

    A `loop.Stream`: what step s holds depends on the seed and s alone, so a run resumes in its data where it
    stopped; of several processes each gets its part.

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
        self.split, self.domain = split, domain
        self.size, self.seed = size, seed
        self.epochs = Epochs(len(split), batch_size, seed)
        self.captions = tokenizer([t.format(c) for c in classes for t in templates])
        self.templates = len(templates)

    def __call__(self, first_step: int) -> Iterator[Batch]:
        """Batches without end from `first_step` on."""
        step = first_step
        while True:
            whole = self.batch(step)
            yield whole if processes.is_single() else whole.rows(processes.local_slice(len(whole.images)))
            step += 1

    def batch(self, step: int) -> Batch:
        """The batch of one step, of all processes."""
        chosen = self.epochs(step)
        part = Split(self.split.images[chosen], self.split.labels[chosen])
        random = generator(self.seed, 1, step)
        images = normalise(self.domain.draw(part, self.size, random))
        template = torch.randint(self.templates, (len(part),), generator=random)
        caption = part.labels * self.templates + template
        distinct, which = caption.unique(return_inverse=True)
        return Batch(images, self.captions[distinct], which, part.labels)
