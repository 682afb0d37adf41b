"""The data of a recipe: pairs to train on, sets to test on, and the texts of the classes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import open_clip
import torch
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from wmateacher.integrations.clip.data import files, imagenet, pictograms
from wmateacher.integrations.clip.data import task as tasks
from wmateacher.integrations.clip.data.batches import Batch, Pairing, Sampling
from wmateacher.integrations.clip.data.digits import PREPROCESSING, DigitPairs, normalise
from wmateacher.integrations.clip.data.photos import PhotoPairs
from wmateacher.integrations.clip.data.pictograms import PictogramPairs
from wmateacher.integrations.clip.data.task import Task, Test
from wmateacher.integrations.clip.data.templates import read_templates
from wmateacher.integrations.clip.evaluation import Labelled, Scorer, TestSet, score, score_set
from wmateacher.integrations.clip.methods import Method
from wmateacher.integrations.clip.model import Prompts, Tokenizer, Towers, evaluation_view
from wmateacher.integrations.clip.recipes import (
    DigitsRecipe,
    EmojiRecipe,
    FileRecipe,
    FolderRecipe,
    PhotoRecipe,
    Settings,
)
from wmateacher.integrations.engine import loop, processes
from wmateacher.integrations.vision import digits
from wmateacher.integrations.vision.digits import Domain, Split

__all__ = [
    "CLIPData", "DigitsData", "EmojiData", "FileData", "FolderData", "PhotoData", "PretrainingData",
    "hash_of", "training_view",
]  # fmt: skip

_TEST_BATCH = 500


class CLIPData(Protocol):
    """The data of a recipe, at the image size of its towers.

    Attributes:
        prompts: The classes, templates and tokenizer.
        tests: The test sets by name; the first is in-distribution.
        validation: The validation sets by name, for all choices that depend on results.
        labelled: Whether training pairs have labels.
        anchored: Whether there are anchor pairs.
        preprocessing: The entries of `open_clip.get_model_preprocess_cfg` in which a saved model's
            preprocessing differs from that of its towers.
    """

    prompts: Prompts
    preprocessing: Mapping[str, Any]
    labelled: bool
    anchored: bool
    tests: Mapping[str, Scorer]
    validation: Mapping[str, Scorer]

    def pairs(self, settings: Settings) -> loop.Stream[Batch]:
        """Return the fine-tuning pairs."""
        ...

    def anchors(self, settings: Settings) -> loop.Stream[Batch] | None:
        """Return pairs like those of pre-training, or None if the data has no such pairs."""
        ...


class PretrainingData(CLIPData, Protocol):
    """The data of a recipe that pre-trains on the data's anchor pairs."""

    def anchors(self, settings: Settings) -> loop.Stream[Batch]:
        """Return the pairs of pre-training."""
        ...

    def fingerprint(self) -> Mapping[str, Any]:
        """Return everything in the data that the pre-trained towers depend on, as JSON can hold it."""
        ...


class DigitsData:
    """Digits drawn anew in a domain at every step; a `PretrainingData`.

    Args:
        recipe: The recipe.
        towers: The towers, for their image size.
        tokenizer: The towers' tokenizer.
        root: The folder that holds the recipe's source of digits.
        download: Whether torchvision may download it.

    Attributes:
        source: The grey digits.
        train: The training split.

    Raises:
        FileNotFoundError: If the digits are missing.
    """

    labelled = anchored = True
    preprocessing = PREPROCESSING

    def __init__(
        self,
        recipe: DigitsRecipe,
        towers: Towers,
        tokenizer: Tokenizer,
        *,
        root: Path | None = None,
        download: bool = False,
    ):
        self.recipe, self._size = recipe, towers.image_size
        with processes.main_process_first():
            self.source = digits.load(recipe.data, root, download=download)
        self.train = self.source.train.subset(recipe.train_images)
        self.prompts = Prompts(self.source.classes, self.source.templates, tokenizer)
        self.tests = self._scorers(self.source.test, {"id": recipe.narrow, **recipe.shifts})
        self.validation = self._scorers(self.source.val, {"id": recipe.narrow, "wide": recipe.wide})

    def draw(self, domain: Domain, settings: Settings) -> DigitPairs:
        """Return the training digits drawn in a domain."""
        return DigitPairs(
            self.train, domain, self.source.classes, self.source.templates, self.prompts.tokenizer,
            size=self._size, batch_size=settings.batch_size, seed=settings.seed,
        )  # fmt: skip

    def pairs(self, settings: Settings) -> DigitPairs:
        """Return pairs in the fine-tuning domain."""
        return self.draw(self.recipe.narrow, settings)

    def anchors(self, settings: Settings) -> DigitPairs:
        """Return pairs in the pre-training domain."""
        return self.draw(self.recipe.wide, settings)

    def fingerprint(self) -> dict[str, Any]:
        """Return everything in the data that the pre-trained towers depend on."""
        content = hash_of(self.train.images, self.train.labels, self.source.classes, self.source.templates)
        return {"data": self.recipe.data, "domain": asdict(self.recipe.wide), "content": content}

    def _scorers(self, split: Split, domains: Mapping[str, Domain]) -> Mapping[str, Scorer]:
        def scorer(domain: Domain) -> Scorer:
            return lambda towers, head: score(towers, head, self._batches(split, domain))

        return {name: scorer(domain) for name, domain in domains.items()}

    def _batches(self, split: Split, domain: Domain) -> Labelled:
        """Yield the split drawn in a domain, the same way every time."""

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            generator = torch.Generator().manual_seed(0)
            for first in range(0, len(split), _TEST_BATCH):
                rows = slice(first, first + _TEST_BATCH)
                part = Split(split.images[rows], split.labels[rows])
                yield normalise(domain.draw(part, self._size, generator)), part.labels

        return batches()


class EmojiData:
    """Pictograms in several styles; a `PretrainingData`.

    Args:
        recipe: The recipe.
        towers: The towers, for their image size.
        tokenizer: The towers' tokenizer.
        root: The folder of the pictograms.

    Raises:
        ValueError: If there is no root, or the folder is damaged.
        FileNotFoundError: If pictograms are missing.
    """

    labelled = anchored = True
    preprocessing = pictograms.PREPROCESSING

    def __init__(
        self, recipe: EmojiRecipe, towers: Towers, tokenizer: Tokenizer, *, root: Path | None = None
    ):
        if root is None:
            raise ValueError(
                f"recipe {recipe.name!r} needs the folder of pictograms, got root=None: pass root=DIR "
                f"(--data-root DIR); {pictograms.HOW_TO_BUILD}"
            )
        self.recipe, self._size = recipe, towers.image_size
        styles = (recipe.style, *recipe.shifts)
        self.source = pictograms.load(root, styles)
        self._train = self.source.parts["train"]
        self._images = {style: pictograms.prepare(self._train.images[style], self._size) for style in styles}
        self.prompts = Prompts(self.source.classes, pictograms.TEMPLATES, tokenizer)
        self.tests, self.validation = self._scorers("test"), self._scorers("validation")

    def pairs(self, settings: Settings) -> PictogramPairs:
        """Return pictograms of one style with captions of their class."""
        texts = [(self.source.classes[label],) for label in self._train.labels.tolist()]
        return self._pairs([self.recipe.style], texts, settings)

    def anchors(self, settings: Settings) -> PictogramPairs:
        """Return pictograms of all styles with captions of their names, kinds and keywords."""
        return self._pairs(list(self._images), self._train.texts, settings)

    def fingerprint(self) -> dict[str, Any]:
        """Return everything in the data that the pre-trained towers depend on."""
        train = self._train
        content = hash_of(*train.images.values(), train.labels, train.texts, self.prompts.templates)
        return {"data": list(train.images), "content": content}

    def _pairs(
        self, styles: Sequence[str], texts: Sequence[Sequence[str]], settings: Settings
    ) -> PictogramPairs:
        return PictogramPairs(
            torch.cat([self._images[style] for style in styles]), self._train.labels.repeat(len(styles)),
            [*texts] * len(styles), self.prompts.templates, self.prompts.tokenizer,
            batch_size=settings.batch_size, seed=settings.seed,
        )  # fmt: skip

    def _scorers(self, name: str) -> Mapping[str, Scorer]:
        part = self.source.parts[name]
        return {("id" if s == self.recipe.style else s): self._scorer(part, s) for s in self._images}

    def _scorer(self, part: pictograms.Part, style: str) -> Scorer:
        images = pictograms.prepare(part.images[style], self._size)
        batches = list(zip(images.split(_TEST_BATCH), part.labels.split(_TEST_BATCH), strict=True))
        return lambda towers, head: score(towers, head, batches)


class FileData:
    """Pairs from image files; what the `CLIPData` of pretrained towers have in common.

    Args:
        recipe: The recipe.
        towers: The towers, for their image size and normalisation.
        prompts: The classes, templates and tokenizer.
        train: The training pairs.
        captions: The class names in the captions of training, if they are not those of the prompts.
        root: The folder that the recipe's anchors are relative to.
        workers: Worker processes that read images, in training and again in evaluation; 0 reads them in this
            process.
    """

    preprocessing: Mapping[str, Any] = {}

    def __init__(
        self,
        recipe: FileRecipe,
        towers: Towers,
        prompts: Prompts,
        train: files.Captioned,
        *,
        captions: Sequence[str] | None = None,
        root: Path | None = None,
        workers: int = 0,
    ):
        self.prompts, self.train = prompts, train
        self.labelled = train.labels is not None
        self._recipe, self._workers = recipe, workers
        self._captions = prompts.classes if captions is None else captions
        self._anchors = None if recipe.anchors is None else files.load(recipe.anchors, root)
        self.anchored = self._anchors is not None
        seen = open_clip.get_model_preprocess_cfg(towers.clip)
        self._view = training_view(towers.image_size, seen["mean"], seen["std"], recipe.scale, recipe.flip)
        self._test_view = evaluation_view(towers)

    def pairs(self, settings: Settings) -> PhotoPairs:
        """Return the pairs of the training set."""
        return self._read(self.train, settings, self._recipe.sampling, self._recipe.pairing)

    def anchors(self, settings: Settings) -> PhotoPairs | None:
        """Return the pairs of the recipe's anchors, or None if it names none."""
        return None if self._anchors is None else self._read(self._anchors, settings, "epochs")

    def _read(
        self, data: files.Captioned, settings: Settings, sampling: Sampling, pairing: Pairing = "once"
    ) -> PhotoPairs:
        return PhotoPairs(
            data, self._view, self.prompts.tokenizer, batch_size=settings.batch_size, seed=settings.seed,
            classes=self._captions, templates=self.prompts.templates, sampling=sampling, pairing=pairing,
            workers=self._workers,
        )  # fmt: skip

    def _scorer(self, test: TestSet) -> Scorer:
        return partial(
            score_set, test=test, transform=self._test_view, batch_size=self._recipe.evaluation_batch,
            workers=self._workers,
        )  # fmt: skip


class FolderData(FileData):
    """Your own images as one classification task; a `CLIPData`.

    Args:
        recipe: The recipe.
        task: The classes and images, as `FolderData.load` lists them.
        towers: The towers, for their image size and normalisation.
        tokenizer: The towers' tokenizer.
        root: The folder that paths are relative to.
        workers: Worker processes that read images.
    """

    def __init__(
        self,
        recipe: FolderRecipe,
        task: Task,
        towers: Towers,
        tokenizer: Tokenizer,
        *,
        root: Path | None = None,
        workers: int = 0,
    ):
        prompts = Prompts(task.classes, read_templates(recipe.templates, root), tokenizer)
        super().__init__(recipe, towers, prompts, task.train, root=root, workers=workers)
        self.task = task
        held = {} if task.validation is None else {"validation": task.validation}
        self.validation: Mapping[str, Scorer]
        self.tests: Mapping[str, Scorer]
        self.validation, self.tests = (
            {name: self._scorer(Test(pairs, len(task.classes))) for name, pairs in sets.items()}
            for sets in (held, task.tests or held)
        )

    @staticmethod
    def load(recipe: FolderRecipe, root: Path | None = None) -> Task:
        """List the images of a recipe.

        Raises:
            ValueError: If something is damaged, empty, double, or of no known class.
            FileNotFoundError: If a folder or file is missing.
        """
        read_templates(recipe.templates, root)
        return tasks.load(
            recipe.train, recipe.tests, root=root, classes=recipe.classes, validation=recipe.validation,
            shots=recipe.shots, seed=recipe.finetune.seed,
        )  # fmt: skip


class PhotoData(FileData):
    """Pairs from files, ImageNet and its shifts; a `CLIPData`.

    Args:
        recipe: The recipe.
        towers: The towers, for their image size and normalisation.
        tokenizer: The towers' tokenizer.
        root: The folder that holds the data sets.
        workers: Worker processes that read images, in training and again in evaluation; 0 reads them in this
            process.

    Attributes:
        train: The training pairs.

    Raises:
        ValueError: If there is no root, or a data set is damaged.
        FileNotFoundError: If a data set is missing; the message says where to get it.
    """

    validation: Mapping[str, Scorer] = {}

    def __init__(
        self,
        recipe: PhotoRecipe,
        towers: Towers,
        tokenizer: Tokenizer,
        *,
        root: Path | None = None,
        workers: int = 0,
    ):
        if root is None:
            raise ValueError(
                f"recipe {recipe.name!r} needs the folder that holds its data sets, got root=None: pass "
                "root=DIR (--data-root DIR)"
            )
        templates = recipe.templates or imagenet.openai_templates()
        prompts = Prompts(imagenet.head_names(), templates, tokenizer)
        train = files.load(recipe.train, root)
        files.check_labels(train, imagenet.CLASSES)
        super().__init__(
            recipe, towers, prompts, train, captions=imagenet.class_names(), root=root, workers=workers
        )
        self._own_templates = bool(recipe.templates)
        self.tests: Mapping[str, Scorer] = {
            name: self._scorer(imagenet.load(name, root, crop_border=recipe.crop_border))
            for name in recipe.tests
        }

    def captioned_for(self, method: Method) -> PhotoData:
        """Return the same data with the captions of a method, unless the recipe has its own."""
        if self._own_templates or method.templates == "openai":
            return self
        captioned = copy(self)
        captioned.prompts = replace(self.prompts, templates=imagenet.tracer_templates())
        return captioned


def hash_of(*parts: Any) -> str:
    """Return a hash of tensors and of what `repr` shows in full."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            digest.update(part.numpy().tobytes())
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()[:16]


def training_view(
    size: int, mean: tuple[float, ...], std: tuple[float, ...], scale: tuple[float, ...], flip: float
) -> Any:
    """Return the training transform: a bicubic random crop, a random flip, and normalisation.

    Args:
        size: The height and width of the result, in pixels.
        mean: The mean of each channel.
        std: The standard deviation of each channel.
        scale: The smallest and largest share of the image in the crop.
        flip: The probability of a horizontal flip.

    Returns:
        A function from a PIL image to a tensor `[3, size, size]`.
    """
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=scale, interpolation=InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(flip),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )
