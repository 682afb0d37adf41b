"""What recipes have in common that fine-tune a pretrained CLIP on images from files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

from wmateacher.checks import one_of
from wmateacher.integrations.clip.data.batches import Pairing, Sampling
from wmateacher.integrations.clip.recipes.base import RECIPES, Recipe
from wmateacher.integrations.engine import settings

__all__ = ["FileRecipe"]

FileT = TypeVar("FileT", bound="FileRecipe")


@dataclass(frozen=True, kw_only=True)
class FileRecipe(Recipe):
    """Fine-tune a pretrained CLIP on images from files.

    Attributes:
        pretrained: A tag of open_clip, a checkpoint file, or `local-dir:DIR`; None for random weights, or
            those of a model such as `local-dir:DIR`.
        train: The training pairs.
        anchors: Pairs like those of pre-training, a .csv or .tsv file of captions or .tar shards, for methods
            that need them.
        sampling: `epochs`, or `balanced` to draw all classes equally often.
        pairing: `once` shows each image once an epoch, with a random caption. `published` draws an epoch's
            pairs among all images with all captions, as the published code does with its table of them: some
            images come several times, and 37% do not come at all.
        scale: The smallest and largest share of an image in a training crop.
        flip: The probability of a horizontal flip.
        evaluate_every: Optimizer steps between evaluations of student and teacher during training; 0
            evaluates at the end only, None after each epoch.
        evaluation_batch: Images per batch in evaluation. It changes the per-batch calibration error, which
            the published figures have in batches of the published training batch size.
        crop_border: Whether to cut off the red border of ObjectNet's images, as its authors ask. The
            published figures are of images with their border.
    """

    pretrained: str | None
    train: str
    anchors: str | None = None
    sampling: Sampling = "epochs"
    pairing: Pairing = "once"
    scale: tuple[float, float] = (0.9, 1.0)
    flip: float = 0.5
    evaluate_every: int | None = None
    evaluation_batch: int = 256
    crop_border: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        settings.check_at_least(self, evaluation_batch=1)
        one_of("sampling", self.sampling, ("epochs", "balanced"))
        one_of("pairing", self.pairing, ("once", "published"))
        if self.pairing == "published" and self.sampling == "balanced":
            raise ValueError(
                "pairing='published' draws images by itself, got sampling='balanced': use sampling='epochs', "
                "or pairing='once'"
            )
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must be two shares of an image such as (0.9, 1.0), got {self.scale}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip must be a probability, got {self.flip}")

    def adjust(self: FileT) -> FileT:
        """Return the recipe without its own `pretrained` if `model` was changed to one with its weights."""
        before = RECIPES.get(self.name)
        unchanged = isinstance(before, FileRecipe) and self.pretrained == before.pretrained
        return replace(self, pretrained=None) if ":" in self.model and unchanged else self


def __dir__() -> list[str]:
    return __all__
