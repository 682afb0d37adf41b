"""Images with labels, and streams of their transformed views that resume exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from wmateacher.checks import one_of
from wmateacher.integrations.engine import processes, signals
from wmateacher.integrations.engine.sampling import Epochs, mix
from wmateacher.integrations.vision import digits

__all__ = ["SOURCES", "Images", "Viewed", "Views", "load"]

SOURCES = (*digits.SOURCES, "cifar10")


@dataclass(frozen=True)
class Images:
    """A data set in three splits of (image, label), the images uint8 `[C, H, W]` or as PIL has them.

    Attributes:
        name: The name, as given to `load`.
        classes: The class names, in the order of the labels.
        train: The images for training.
        val: The images for all choices that depend on results.
        test: The images for reported results.
        labels: The labels of the training images, int64 `[N]`.
        channels: The number of channels: 1 for grey images, 3 for colour.
    """

    name: str
    classes: tuple[str, ...]
    train: Dataset[Any]
    val: Dataset[Any]
    test: Dataset[Any]
    labels: Tensor
    channels: int


def load(name: str, root: str | Path | None = None, *, download: bool = False) -> Images:
    """Load images as they are; `wmateacher.integrations.vision.digits` draws the grey ones in colour.

    Args:
        name: `"digits"`, `"mnist"`, `"fashion-mnist"`, `"cifar10"` (through torchvision: 48,000 / 2,000 of
            its training images and its 10,000 test images), or `"imagefolder:DIR"`: a folder with
            `train` and `val`, a subfolder for each class in both; 5% of `train` is held out.
        root: The folder that holds torchvision's files.
        download: Whether torchvision may download missing files.

    Raises:
        ValueError: If the name is unknown, or `root` is missing.
        FileNotFoundError: If the files are missing.
    """
    kind, _, folder = name.partition(":")
    if kind == "imagefolder":
        return _folders(Path(folder))
    one_of("data", name, (*SOURCES, "imagefolder:DIR"))
    if kind == "cifar10":
        return _cifar10(root, download)
    source = digits.load(kind, root, download=download)
    train, val, test = (
        TensorDataset((255 * part.images).round().to(torch.uint8), part.labels)
        for part in (source.train, source.val, source.test)
    )
    return Images(name, source.classes, train, val, test, source.train.labels, 1)


def _cifar10(root: str | Path | None, download: bool) -> Images:
    from torchvision import datasets

    if root is None:
        raise ValueError(
            "data 'cifar10' needs the folder that holds it, got root=None: pass root=DIR (--data-root DIR), "
            "and download=True (--download) to fetch it there"
        )
    try:
        train, test = (datasets.CIFAR10(str(root), train=t, download=download) for t in (True, False))
    except RuntimeError as error:
        raise FileNotFoundError(
            f"no cifar10 in {root} ({error}): give the folder above 'cifar-10-batches-py' as root "
            "(--data-root), or pass download=True (--download)"
        ) from error

    def split(data: Any) -> digits.Split:
        return digits.Split(torch.from_numpy(data.data).permute(0, 3, 1, 2), torch.tensor(data.targets))

    kept, held = digits.stratify(split(train), 2000)
    ours, val, unseen = (TensorDataset(part.images, part.labels) for part in (kept, held, split(test)))
    return Images("cifar10", tuple(train.classes), ours, val, unseen, kept.labels, 3)


def _folders(folder: Path) -> Images:
    from torchvision import datasets

    parts = []
    for part in ("train", "val"):
        if not (folder / part).is_dir():
            raise FileNotFoundError(
                f"no folder {folder / part}: data 'imagefolder:DIR' needs DIR/train and DIR/val, each with "
                "one folder of images per class"
            )
        parts.append(datasets.ImageFolder(str(folder / part)))
    train, test = parts
    if len(train) < 20:
        raise ValueError(f"{folder}/train has {len(train)} images: give at least 20")
    if train.classes != test.classes:
        differing = sorted(set(train.classes) ^ set(test.classes))
        raise ValueError(f"{folder}/train and {folder}/val differ in their classes: {differing[:5]}")
    # As is usual with ImageNet, `val` is the test set, so the validation images come out of `train`.
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    held = len(train) // 20
    kept = sorted(order[held:])
    labels = torch.tensor(train.targets)[kept]
    val = Subset(train, sorted(order[:held]))
    return Images(f"imagefolder:{folder}", tuple(train.classes), Subset(train, kept), val, test, labels, 3)


Transform = Callable[[Any], Any]


class Views:
    """A `loop.Stream` of transformed images with their labels.

    The batch of a step depends on the seed and the step alone, whatever the number of workers and processes.
    Each process gets its part.

    Args:
        data: The (image, label) pairs.
        transform: Maps an image to a tensor or a tuple of tensors. Its random numbers must be torch's.
        batch_size: Images per step.
        seed: The seed of the order and the transforms.
        indices: The indices of the images to use. Default: all.
        workers: The number of processes that prepare batches; 0 for the calling process.
        what: The name of the images in messages.
        order: Gives the indices of each step's images. Default: `Epochs`.

    Raises:
        ValueError: If a batch is larger than the data.
    """

    def __init__(
        self,
        data: Dataset[Any],
        transform: Transform,
        batch_size: int,
        seed: int,
        *,
        indices: Tensor | None = None,
        workers: int = 0,
        what: str = "training images",
        order: Callable[[int], Tensor] | None = None,
    ):
        self.indices = torch.arange(len(data)) if indices is None else indices  # type: ignore[arg-type]
        self.order = order or Epochs(len(self.indices), batch_size, seed, what)
        self.seed, self.workers = seed, workers
        self._data = _Seeded(data, transform)

    def __call__(self, first_step: int) -> Iterator[Any]:
        """Return batches from `first_step` on, without end: the stacked views, and labels."""
        loader: DataLoader[Any] = DataLoader(
            self._data,
            batch_sampler=self._keys(first_step),
            num_workers=self.workers,
            worker_init_fn=signals.leave_to_main,
            pin_memory=torch.cuda.is_available(),
            # Without a generator the loader would draw from the global one and change the run.
            generator=torch.Generator(),
        )
        return iter(loader)

    def _keys(self, step: int) -> Iterator[list[tuple[int, int]]]:
        while True:
            chosen = self.indices[self.order(step)].tolist()
            keys = [(index, mix(self.seed, 2, step, i)) for i, index in enumerate(chosen)]
            yield keys[processes.local_slice(len(keys))]
            step += 1


class Viewed(Dataset[Any]):
    """Images under one transform, with their labels.

    Args:
        data: The (image, label) pairs.
        view: Maps an image to a tensor.
        indices: The indices of the images to use. Default: all.
    """

    def __init__(self, data: Dataset[Any], view: Transform, indices: Tensor | None = None):
        self.data, self.view = data, view
        self.indices = torch.arange(len(data)) if indices is None else indices  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Any, Any]:
        image, label = self.data[int(self.indices[position])]
        return self.view(image), label


class _Seeded(Dataset[Any]):
    """Transformed images by (index, seed of the transform)."""

    def __init__(self, data: Dataset[Any], transform: Transform):
        self.data, self.transform = data, transform

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[Any]:
        with torch.random.fork_rng(devices=[]):
            return [self._view(*key) for key in keys]

    def _view(self, index: int, seed: int) -> Any:
        image, label = self.data[index]
        torch.default_generator.manual_seed(seed)
        return self.transform(image), label
