"""Digits drawn with captions, as batches of image-text pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from wmateacher.integrations.clip.data.batches import Batch, own_parts
from wmateacher.integrations.clip.model import Tokenizer
from wmateacher.integrations.engine.sampling import Epochs, generator
from wmateacher.integrations.vision.digits import Domain, Split

__all__ = ["PREPROCESSING", "DigitPairs", "normalise"]

_MEAN, _STD = 0.5, 0.25
PREPROCESSING: Mapping[str, Any] = {"mean": (_MEAN,) * 3, "std": (_STD,) * 3}
"""The same as `normalise`, in the terms of `open_clip.get_model_preprocess_cfg`."""


def normalise(images: Tensor) -> Tensor:
    """Map pixels in [0, 1] to the range that the small towers are trained on."""
    return (images - _MEAN) / _STD


class DigitPairs:
    """Digits drawn anew in a domain at every step, each with the caption of a random template.

    This is a `loop.Stream`. The content of a step depends on the seed and the step alone, so a resumed run
    continues in its data. Each of several processes gets its part of every batch.

    Args:
        split: The grey digits and their labels.
        domain: The domain that they are drawn in.
        classes: The class names.
        templates: Captions with one `{}` for the class name.
        tokenizer: The towers' tokenizer.
        size: The image size in pixels.
        batch_size: Pairs per step.
        seed: The seed of order, drawing and captions.

    Raises:
        ValueError: If the split has fewer images than a batch.
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
        """Return this process's batches without end, from `first_step` on."""
        return own_parts(self.batch, first_step)

    def batch(self, step: int) -> Batch:
        """Return the batch of one step, with the pairs of all processes."""
        indices = self.epochs(step)
        drawn = Split(self.split.images[indices], self.split.labels[indices])
        random = generator(self.seed, 1, step)
        images = normalise(self.domain.draw(drawn, self.size, random))
        template = torch.randint(self.templates, (len(drawn),), generator=random)
        caption = drawn.labels * self.templates + template
        distinct, which = caption.unique(return_inverse=True)
        return Batch(images, self.captions[distinct], which, drawn.labels)
