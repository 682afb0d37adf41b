"""Photographs with captions, read from files, as batches of image-text pairs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from wmateacher.integrations.clip.data.batches import Batch, Pairing, Sampling
from wmateacher.integrations.clip.data.files import Captioned
from wmateacher.integrations.clip.model import Tokenizer
from wmateacher.integrations.engine import processes
from wmateacher.integrations.engine.sampling import (
    Balanced,
    Epochs,
    check_batch_size,
    generator,
    mix,
    steps_per_epoch,
)
from wmateacher.integrations.vision.images import Views

__all__ = ["PhotoPairs", "Rows"]

_MOST_UNREADABLE = 20


class PhotoPairs:
    """Image-text pairs read from files.

    This is a `loop.Stream`. The content of a step depends on the seed and the step alone, however many
    workers and processes there are; each process gets its part. An image that cannot be read is replaced by
    the next one that can. The batch counts these, and the first one causes a warning.

    Args:
        data: The pairs.
        transform: A function from a PIL image to a tensor, random through torch's generator only.
        tokenizer: The towers' tokenizer.
        batch_size: Pairs per step.
        seed: The seed of order, transforms and captions.
        classes: The class names, for captions made of them.
        templates: Captions with one `{}`; one is drawn for each image and step.
        sampling: `"epochs"` draws a new permutation each epoch and fills its last batch up with the epoch's
            first images. `"balanced"` draws all classes equally often, see `Balanced`.
        pairing: `"once"` draws one caption for each image of a batch. `"published"` draws the pairs, see
            `Rows`.
        workers: Worker processes that read images; 0 reads them in this process.

    Raises:
        ValueError: If a batch is larger than the data, balanced batches are asked for without labels, or
            published pairs of texts that are not templates or of balanced batches.
    """

    def __init__(
        self,
        data: Captioned,
        transform: Callable[[Any], Tensor],
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        seed: int,
        classes: Sequence[str] = (),
        templates: Sequence[str] = (),
        sampling: Sampling = "epochs",
        pairing: Pairing = "once",
        workers: int = 0,
    ):
        self.data, self.tokenizer, self.seed = data, tokenizer, seed
        self.classes, self.templates = classes, templates
        if sampling == "balanced":
            if data.labels is None:
                raise ValueError(
                    "sampling='balanced' needs labels, the data has captions only: give a label for each "
                    "image, or use sampling='epochs'"
                )
            self.order: Epochs | Balanced | Rows = Balanced(data.labels, batch_size, seed, "training pairs")
        elif pairing == "published":
            if not data.templated:
                raise ValueError(
                    "pairing='published' needs captions made of templates, and these pairs have their own: "
                    "use pairing='once'"
                )
            self.order = Rows(len(data), len(templates), batch_size, seed)
        else:
            self.order = Epochs(len(data), batch_size, seed, "training pairs", fill=True)
        self._views = Views(
            _Readable(data), transform, batch_size, seed, workers=workers, order=self.order
        )  # fmt: skip
        self._warned = False

    def __call__(self, first_step: int) -> Iterator[Batch]:
        """Yield this process's batches without end, from `first_step` on."""
        for step, (images, (captions, used)) in enumerate(self._views(first_step), first_step):
            yield self._batch(step, images, list(captions), used)

    def _batch(self, step: int, images: Tensor, captions: list[str], used: Tensor) -> Batch:
        whole = self.order(step)
        own = processes.local_slice(len(whole))
        labels = None if self.data.labels is None else self.data.labels[used]
        if self.data.templated and labels is not None:
            # Drawn for all processes' images, so that captions do not depend on the number of processes.
            if isinstance(self.order, Rows):
                drawn = self.order.templates(step)
            else:
                random = generator(self.seed, 1, step)
                drawn = torch.randint(len(self.templates), (len(whole),), generator=random)
            captions = [
                self.templates[template].format(self.classes[label])
                for template, label in zip(drawn[own].tolist(), labels.tolist(), strict=True)
            ]
        distinct = list(dict.fromkeys(captions))
        row = {text: i for i, text in enumerate(distinct)}
        caption = torch.tensor([row[text] for text in captions])
        missing = whole[own] != used
        if missing.any() and not self._warned:
            first = self.data.name(int(whole[own][missing][0]))
            warnings.warn(
                f"{first} cannot be read: the next image replaces it, as for every other such image; the "
                "log counts them as unreadable",
                stacklevel=2,
            )
            self._warned = True
        return Batch(images, self.tokenizer(distinct), caption, labels, int(missing.sum()))


class Rows:
    """Choose the images and captions of each step among all pairs of an image and a template.

    The published code trains on a table of all these pairs, and ends an epoch after as many steps as the
    images alone would take. Each epoch draws new pairs without replacement.

    Args:
        count: The number of images.
        templates: The number of templates.
        batch_size: Pairs per step.
        seed: The seed of the draws.

    Attributes:
        steps_per_epoch: The number of steps in which as many pairs are drawn as there are images, rounded up.

    Raises:
        ValueError: If a batch is larger than the data.
    """

    def __init__(self, count: int, templates: int, batch_size: int, seed: int):
        check_batch_size(batch_size, count, "training pairs")
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.steps_per_epoch = steps_per_epoch(count, batch_size)
        self._templates = templates
        # Of two epochs, since workers read ahead into the next one.
        self._epoch = lru_cache(2)(self._draw)

    def __call__(self, step: int) -> Tensor:
        """Return the indices of a step's images, int64 `[batch_size]`."""
        return self._rows(step) // self._templates

    def templates(self, step: int) -> Tensor:
        """Return the indices of a step's templates, int64 `[batch_size]`."""
        return self._rows(step) % self._templates

    def _rows(self, step: int) -> Tensor:
        epoch, position = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[position * self.batch_size :][: self.batch_size]

    def _draw(self, epoch: int) -> Tensor:
        # numpy draws a few of many without a permutation of all 110 million, which torch would need.
        rows, wanted = self.count * self._templates, self.steps_per_epoch * self.batch_size
        random = np.random.default_rng(mix(self.seed, 0, epoch))
        return torch.from_numpy(np.resize(random.choice(rows, min(wanted, rows), replace=False), wanted))


class _Readable(Dataset[Any]):
    """(image, (text, index)) of an image, or of the next one that can be read."""

    def __init__(self, data: Captioned):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Image.Image, tuple[str, int]]:
        for ahead in range(_MOST_UNREADABLE):
            tried = (index + ahead) % len(self)
            try:
                image, text = self.data.read(tried)
            except OSError:
                continue
            return image, (text, tried)
        raise OSError(
            f"{self.data.name(index)} and the {_MOST_UNREADABLE - 1} images after it cannot be read: check "
            "the paths and the files"
        )
