"""Photographs with captions, read from files, as batches of image-text pairs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from wmateacher.integrations.clip.data.batches import Batch, Sampling
from wmateacher.integrations.clip.data.files import Captioned
from wmateacher.integrations.clip.model import Tokenizer
from wmateacher.integrations.engine import processes
from wmateacher.integrations.engine.sampling import Balanced, Epochs, generator
from wmateacher.integrations.vision.images import Views

__all__ = ["PhotoPairs"]

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
        workers: Worker processes that read images; 0 reads them in this process.

    Raises:
        ValueError: If a batch is larger than the data, or balanced batches are asked for without labels.
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
            self.order: Epochs | Balanced = Balanced(data.labels, batch_size, seed, "training pairs")
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
            drawn = torch.randint(len(self.templates), (len(whole),), generator=generator(self.seed, 1, step))
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
