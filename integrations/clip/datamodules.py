"""What a recipe's methods see: pairs to train on, sets to test on, texts of the classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import open_clip
import torch
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from wmateacher.integrations.clip.data import files, imagenet
from wmateacher.integrations.clip.data.batches import Batch, DrawnPairs, normalise
from wmateacher.integrations.clip.data.photos import FilePairs, Sampling
from wmateacher.integrations.clip.evaluation import Labelled, Scorer, score, score_set
from wmateacher.integrations.clip.heads import Prompts
from wmateacher.integrations.clip.model import Tokenizer, Towers
from wmateacher.integrations.clip.recipes import DigitsRecipe, PhotoRecipe
from wmateacher.integrations.clip.training import Settings
from wmateacher.integrations.engine import loop, processes
from wmateacher.integrations.vision import digits
from wmateacher.integrations.vision.digits import Domain, Split

_DRAWN_BATCH = 500


class CLIPData(Protocol):
    """A recipe's data, at the size that its towers take.

    Attributes:
        prompts: Classes, templates, tokenizer.
        tests: By name; the first is in-distribution.
        validation: Likewise, for every choice that is made by looking at results.
        labelled: Whether training pairs have classes.
        anchored: Whether there are anchor pairs.
    """

    prompts: Prompts
    labelled: bool
    anchored: bool
    tests: Mapping[str, Scorer]
    validation: Mapping[str, Scorer]

    def pairs(self, settings: Settings) -> loop.Stream[Batch]:
        """What fine-tuning sees."""
        ...

    def anchors(self, settings: Settings) -> loop.Stream[Batch] | None:
        """Pairs like those of pre-training, where there are any."""
        ...


class DigitsData:
    """Digits, drawn anew in a domain at every step; a `CLIPData`.

    Args:
        recipe: Which.
        towers: That will see them.
        tokenizer: Of the towers.
        root: Where the recipe's data lies.
        download: Let torchvision download it.

    Attributes:
        source: The grey digits.
        train: Those to train on.

    Raises:
        FileNotFoundError: The data is not there.
    """

    labelled = anchored = True

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

    def drawn(self, domain: Domain, settings: Settings) -> DrawnPairs:
        """Training digits in a domain."""
        return DrawnPairs(
            self.train, domain, self.source.classes, self.source.templates, self.prompts.tokenizer,
            size=self._size, batch_size=settings.batch_size, seed=settings.seed,
        )  # fmt: skip

    def pairs(self, settings: Settings) -> DrawnPairs:
        """In the fine-tuning domain."""
        return self.drawn(self.recipe.narrow, settings)

    def anchors(self, settings: Settings) -> DrawnPairs:
        """In the pre-training domain."""
        return self.drawn(self.recipe.wide, settings)

    def _scorers(self, split: Split, domains: Mapping[str, Domain]) -> Mapping[str, Scorer]:
        """Scores on a split drawn in each domain, always the same way."""

        def scorer(domain: Domain) -> Scorer:
            return lambda towers, head: score(towers, head, self._batches(split, domain))

        return {name: scorer(domain) for name, domain in domains.items()}

    def _batches(self, split: Split, domain: Domain) -> Labelled:
        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            generator = torch.Generator().manual_seed(0)
            for first in range(0, len(split), _DRAWN_BATCH):
                chosen = slice(first, first + _DRAWN_BATCH)
                part = Split(split.images[chosen], split.labels[chosen])
                yield normalise(domain.draw(part, self._size, generator)), part.labels

        return batches()


class PhotoData:
    """Pairs from files, ImageNet and its shifts; a `CLIPData`.

    Args:
        recipe: Which.
        towers: That will see them; their normalisation is used.
        tokenizer: Of the towers.
        root: The folder that holds the sets.
        workers: Processes that read images, for training and as many for evaluation; 0: this one.

    Attributes:
        train: The pairs.

    Raises:
        ValueError: No root; what a set has is wrong.
        FileNotFoundError: A set is not there; says how to get it.
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
        self.recipe, self._workers = recipe, workers
        self.prompts = Prompts(imagenet.CLASSES, recipe.templates, tokenizer)
        self.train = files.load(recipe.train, root)
        files.check_labels(self.train, len(imagenet.CLASSES))
        self.labelled = self.train.labels is not None
        self._anchors = None if recipe.anchors is None else files.load(recipe.anchors, root)
        self.anchored = self._anchors is not None
        seen = open_clip.get_model_preprocess_cfg(towers.clip)
        self._view = training_view(towers.image_size, seen["mean"], seen["std"], recipe.scale, recipe.flip)
        view = open_clip.image_transform(
            towers.image_size, is_train=False, mean=seen["mean"], std=seen["std"]
        )
        self.tests: Mapping[str, Scorer] = {
            name: partial(
                score_set, test=imagenet.load(name, root), transform=view,
                batch_size=recipe.evaluation_batch, workers=workers,
            )
            for name in recipe.tests
        }  # fmt: skip

    def pairs(self, settings: Settings) -> FilePairs:
        """Of the training set."""
        return self._read(self.train, settings, self.recipe.sampling)

    def anchors(self, settings: Settings) -> FilePairs | None:
        """Those that the recipe names."""
        return None if self._anchors is None else self._read(self._anchors, settings, "epochs")

    def _read(self, data: files.Captioned, settings: Settings, sampling: Sampling) -> FilePairs:
        return FilePairs(
            data, self._view, self.prompts.tokenizer, batch_size=settings.batch_size, seed=settings.seed,
            classes=self.prompts.classes, templates=self.prompts.templates, sampling=sampling,
            workers=self._workers,
        )  # fmt: skip


def training_view(
    size: int, mean: tuple[float, ...], std: tuple[float, ...], scale: tuple[float, ...], flip: float
) -> Any:
    """A PIL image to a tensor `[3, size, size]`: a bicubic random crop, a flip at random, normalised."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=scale, interpolation=InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(flip),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )
