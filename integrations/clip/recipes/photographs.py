"""The paper's main experiment: ImageNet and its shifts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from wmateacher.checks import lookup
from wmateacher.integrations.clip.data import imagenet
from wmateacher.integrations.clip.data.templates import check_templates
from wmateacher.integrations.clip.methods import METHODS, tracer_terms
from wmateacher.integrations.clip.recipes.base import RECIPES, Settings
from wmateacher.integrations.clip.recipes.files import FileRecipe
from wmateacher.integrations.engine import settings
from wmateacher.integrations.engine.sampling import steps_per_epoch

__all__ = ["IMAGENET", "PhotoRecipe"]


@dataclass(frozen=True, kw_only=True)
class PhotoRecipe(FileRecipe):
    """Fine-tune a pretrained CLIP on image-text pairs from files; evaluate on ImageNet and its shifts.

    Attributes:
        train: The training pairs: `imagenet-train`, a .csv or .tsv file of captions, or .tar shards.
        anchors: Pairs like those of pre-training, named like `train`, for methods that need them.
        tests: The test sets; the first is in-distribution.
        templates: Captions with one `{}` for the class, in training and in the zero-shot head. If empty,
            OpenAI's 80 are used.
        epochs: Passes over the training pairs. If it is None, or `finetune.steps` was changed,
            `finetune.steps` decides.
    """

    train: str = "imagenet-train"
    tests: tuple[str, ...] = ("imagenet", *imagenet.SHIFTS)
    templates: tuple[str, ...] = ()
    epochs: int | None = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.tests:
            lookup("data set", name, imagenet.SETS)
        if not self.tests:
            raise ValueError("tests must have at least one data set: the first is in-distribution")
        check_templates(self.templates)
        if self.epochs is not None:
            settings.check_at_least(self, epochs=1)

    def adjust(self) -> PhotoRecipe:
        """Return the recipe without `epochs` if the steps of fine-tuning were changed."""
        before = RECIPES.get(self.name)
        changed = before is not None and self.finetune.steps != before.finetune.steps
        recipe = super().adjust()
        return replace(recipe, epochs=None) if changed else recipe

    def resolve(self, pairs: int) -> PhotoRecipe:
        """Return the recipe with the numbers of steps that follow from the number of training pairs.

        Raises:
            ValueError: If the warm-up is not shorter than the run.
        """
        each = steps_per_epoch(pairs, self.finetune.batch_size)
        steps = self.finetune.steps if self.epochs is None else self.epochs * each
        warmup = self.finetune.warmup
        if warmup and warmup >= steps:
            raise ValueError(
                f"warmup must be shorter than the run, got {warmup} of {steps} steps ({pairs:,} pairs in "
                f"batches of {self.finetune.batch_size}): pass --finetune.warmup {steps // 10}"
            )
        every = each if self.evaluate_every is None else self.evaluate_every
        return replace(self, finetune=replace(self.finetune, steps=steps), evaluate_every=every)

    def with_steps(self, steps: int | None) -> PhotoRecipe:
        """Return the recipe with another number of fine-tuning steps, which replaces `epochs`."""
        return self if steps is None else replace(super().with_steps(steps), epochs=None)


def _imagenet(
    name: str,
    model: str,
    width: int,
    batch: int,
    *,
    learning_rate: float = 1e-5,
    weight_decay: float = 0.1,
    elementwise: float = 2000.0,
    c_f: float = 0.05,
    distill_weight: float = 0.9,
) -> PhotoRecipe:
    """Return a published recipe: AdamW, 500 steps of warm-up, cosine decay, 10 epochs, bf16."""
    pairs = imagenet.SETS["imagenet-train"].images
    distillation = tracer_terms(width, elementwise)
    regularised = ("static-sd", "ema", "carot", "tracer")
    methods = {n: replace(m, cross_frobenius=c_f) if n in regularised else m for n, m in METHODS.items()}
    for teacher in ("static-sd", "ema", "tracer"):
        methods[teacher] = replace(
            methods[teacher], distillation=distillation, distill_weight=distill_weight, templates="tracer"
        )
    methods["ema"] = replace(methods["ema"], orthogonality=0.2)
    return PhotoRecipe(
        name=name,
        summary=f"the paper's main experiment: {model} of OpenAI -> ImageNet -> five shifts",
        model=f"{model}-quickgelu",
        pretrained="openai",
        finetune=Settings(
            steps=10 * steps_per_epoch(pairs, batch), learning_rate=learning_rate, batch_size=batch,
            weight_decay=weight_decay, warmup=500, precision="bf16", checkpoint_every=500,
        ),
        methods=methods,
        default=("zero-shot", "flyp", "carot", "tracer"),
        evaluation_batch=batch,
        published=name.removeprefix("imagenet-"),
    )  # fmt: skip


IMAGENET = (
    _imagenet("imagenet-vit-b-16", "ViT-B-16", 512, 512),
    _imagenet("imagenet-vit-l-14", "ViT-L-14", 768, 224),
    _imagenet(
        "imagenet-rn50", "RN50", 1024, 512,
        learning_rate=9e-6, weight_decay=0.02, elementwise=200.0, c_f=0.01, distill_weight=0.01,
    ),
)  # fmt: skip
"""The recipes of ViT-B/16, ViT-L/14 and RN50."""


def __dir__() -> list[str]:
    return __all__
