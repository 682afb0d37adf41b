"""The recipe on your own images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from wmateacher.integrations.clip.methods import METHODS, TRACER_TERMS, tracer_terms, with_batch_statistics
from wmateacher.integrations.clip.recipes.base import Settings
from wmateacher.integrations.clip.recipes.files import FileRecipe
from wmateacher.integrations.engine import settings
from wmateacher.integrations.engine.sampling import steps_per_epoch
from wmateacher.integrations.engine.settings import Hidden

__all__ = ["FOLDERS", "FolderRecipe", "OwnSettings"]


@dataclass(frozen=True, kw_only=True)
class OwnSettings(Settings):
    """How a run on your own images is optimised; its length follows from the images.

    Attributes:
        steps: Number of optimizer steps T; 0 for as many as the recipe's `epochs` make.
        batch_size: Image-text pairs per step; all of them if there are fewer.
        warmup: Steps of linear warm-up; -1 for the recipe's `warmup_share`.
    """

    least: ClassVar[Mapping[str, int]] = {**Settings.least, "steps": 0, "warmup": -1}

    steps: int = 0
    warmup: int = -1


@dataclass(frozen=True, kw_only=True)
class FolderRecipe(FileRecipe):
    """Fine-tune a pretrained CLIP on your own images, and evaluate it on your test sets.

    Attributes:
        train: The training images: a folder of class folders, a .csv or .tsv file with the columns filepath,
            title and label (one of the last two suffices), or .tar shards.
        tests: Test sets, each a name and images like `train`; the first is in-distribution. If there are
            none, the validation images are.
        classes: A text file with a class name on each line, or a label, a tab and a class name. By default
            the labels are the names, with spaces for underscores.
        templates: `openai` or `simple` for a list of open_clip, a file with a caption on each line, or
            captions; each caption has one `{}` for the class.
        validation: The share of the training images to hold out for the `validation` accuracy.
        shots: The number of images of each class to train on, or None for all.
        epochs: Passes over the training images, unless `finetune.steps` is given or they make fewer than
            `min_steps`.
        min_steps: The least number of steps that `epochs` make: few images are passed over more often.
        warmup_share: The share of the steps with a linear warm-up, unless `finetune.warmup` is given.
        digest: The digest of the images that the run is on, once `resolve` knows it.
    """

    finetune: OwnSettings
    train: str = ""
    tests: tuple[tuple[str, str], ...] = ()
    classes: str | None = None
    templates: tuple[str, ...] = ("simple",)
    validation: float = 0.1
    shots: int | None = None
    epochs: int = 20
    min_steps: int = 200
    warmup_share: float = 0.1
    evaluate_every: int | None = 0
    digest: Hidden[str] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_captions()
        settings.check_at_least(self, epochs=1, min_steps=1)
        if self.shots is not None:
            settings.check_at_least(self, shots=1)
        if not 0 <= self.validation < 1:
            raise ValueError(f"validation must be a share of the images in [0, 1), got {self.validation}")
        if not 0 <= self.warmup_share < 1:
            raise ValueError(f"warmup_share must be a share of the steps in [0, 1), got {self.warmup_share}")

    def resolve(self, pairs: int, width: int, digest: str, processes: int = 1) -> FolderRecipe:
        """Return the recipe with the values that follow from the images and the towers.

        Args:
            pairs: The number of training images.
            width: The width of the embeddings. TRACER's distillation has the published coefficient for it.
            digest: The digest of the images, so that results of other images are not mixed.
            processes: The number of processes that share each batch.

        Raises:
            ValueError: If there are fewer images than processes, or the warm-up is not shorter than the run.
        """
        own, batch = self.finetune, self.finetune.batch_size
        if pairs < processes:
            raise ValueError(f"{pairs} training images are too few for {processes} processes: start fewer")
        if batch > pairs:
            batch = pairs - pairs % processes
        each = steps_per_epoch(pairs, batch)
        steps = own.steps or max(self.epochs * each, self.min_steps)
        warmup = int(self.warmup_share * steps) if own.warmup < 0 else own.warmup
        if warmup and warmup >= steps:
            raise ValueError(f"finetune.warmup must be shorter than the run, got {warmup} of {steps} steps")
        methods = dict(self.methods)
        for name, method in methods.items():
            if method.distillation == TRACER_TERMS:
                methods[name] = replace(method, distillation=tracer_terms(width))
        if "carot" in methods and methods["carot"].update_every == METHODS["carot"].update_every:
            # As often per run as the published one.
            methods["carot"] = replace(methods["carot"], update_every=max(1, steps // 50))
        return replace(
            self, finetune=replace(own, steps=steps, batch_size=batch, warmup=warmup), methods=methods,
            evaluate_every=each if self.evaluate_every is None else self.evaluate_every, digest=digest,
        )  # fmt: skip

    def with_steps(self, steps: int | None) -> FolderRecipe:
        """Return the recipe with a number of fine-tuning steps, which replaces `epochs`."""
        return self if steps is None else replace(self, finetune=replace(self.finetune, steps=steps))


FOLDERS = FolderRecipe(
    name="folders",
    summary="your own images: a pretrained CLIP -> --train DIR -> --tests NAME DIR ...",
    model="ViT-B-32-quickgelu",
    pretrained="openai",
    finetune=OwnSettings(learning_rate=1e-5, batch_size=64),
    methods=with_batch_statistics(METHODS),
    default=("zero-shot", "flyp", "tracer"),
)


def __dir__() -> list[str]:
    return __all__
