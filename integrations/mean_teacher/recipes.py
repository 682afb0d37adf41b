"""The methods and recipes of semi-supervised learning: loss, teacher, images, labels and network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from wmateacher import kernels
from wmateacher.checks import lookup, one_of
from wmateacher.integrations.engine import settings
from wmateacher.integrations.engine.settings import Hidden, check_at_least

__all__ = ["CONSISTENCIES", "METHODS", "RECIPES", "Method", "Recipe", "Settings"]

CONSISTENCIES = ("mse", "kl", "pseudo")


@dataclass(frozen=True)
class Method:
    """A loss, and the target that the student's predictions on unlabelled images are pulled to.

        L = CE(student(weak labelled), label)
            + distill_weight ramp(t) consistency(student(strong), target(weak))

    The target is the teacher's prediction, or without a teacher the student's own before the step. It has no
    gradient; the student's prediction on the strong view has one.

    Attributes:
        name: Name in tables and on the command line.
        summary: A description of the method, with its source.
        kernel: The teacher's kernel; None for no teacher.
        consistency: `mse` between probabilities, `kl`, or `pseudo` for cross-entropy against the target's
            most probable class.
        distill_weight: Weight of the consistency after its ramp-up; 0 to train on labels alone.
        confidence: Smallest value of the largest target probability for an image to count, 0.95 in FixMatch;
            None counts all images.

    Raises:
        ValueError: If the consistency or the kernel is unknown, or a number is out of range.
    """

    name: Hidden[str]
    summary: Hidden[str]
    kernel: str | None = None
    consistency: Literal["mse", "kl", "pseudo"] = "mse"
    distill_weight: float = 0.0
    confidence: float | None = None

    def __post_init__(self) -> None:
        one_of("consistency", self.consistency, CONSISTENCIES)
        check_at_least(self, distill_weight=0)
        if self.confidence is not None and not 0 <= self.confidence < 1:
            raise ValueError(f"confidence must be in [0, 1), got {self.confidence}")
        if self.kernel is not None:
            kernels.build(self.kernel)


# The MSE is a mean over the classes, hence the large weight.
_WEIGHT = 10.0
METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("supervised", "The labelled images alone"),
        Method(
            "pi-model", "Pi-model: the student is its own teacher (Laine & Aila 2017)", distill_weight=_WEIGHT
        ),
        Method(
            "mean-teacher",
            "Mean teacher: an EMA of the student (Tarvainen & Valpola 2017)",
            kernel="ema(0.95)",
            distill_weight=_WEIGHT,
        ),
        Method(
            "fixmatch",
            "FixMatch: the student's own confident predictions as labels (Sohn et al. 2020)",
            consistency="pseudo",
            distill_weight=1.0,
            confidence=0.95,
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Settings(settings.Settings):
    """The optimisation of a run: SGD with Nesterov momentum, a linear warm-up, a cosine decay to 0.

    Attributes:
        labelled_batch: Labelled images per step.
        unlabelled_batch: Unlabelled images per step.
        momentum: Momentum of SGD.
        rampup: Steps of a sigmoid ramp-up of the consistency's weight.
        mode: `train` normalises in the teacher with the statistics of its own batch, as the paper does, and
            `eval` with running statistics.
        buffers: The policy for the running statistics of a teacher in `eval` mode: `copy` the student's,
            `average` them like weights, or `keep` the first.
        precision: `fp32`, or `bf16` for autocast with float32 weights.
    """

    labelled_batch: int
    unlabelled_batch: int
    momentum: float = 0.9
    weight_decay: float = 5e-4
    rampup: int = 0
    mode: Literal["train", "eval"] = "train"
    buffers: Literal["copy", "average", "keep"] = "copy"
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, labelled_batch=1, unlabelled_batch=1, rampup=0)


@dataclass(frozen=True)
class Recipe:
    """Train a classifier from few labels and many images.

    Attributes:
        data: `digits`, `mnist`, `fashion-mnist` or `cifar10`.
        labels: Number of labelled images, split evenly between the classes.
        backbone: A timm network with its arguments, such as `resnet18(output_stride=8)`.
        image_size: Height and width, in pixels.
        flip: Mirror half of the views: right for photographs and clothes, wrong for digits.
        settings: The optimisation of every method.
        methods: The methods by name.
    """

    data: str
    labels: int
    backbone: str
    image_size: int
    flip: bool
    settings: Settings
    methods: Mapping[str, Method] = field(default_factory=lambda: dict(METHODS))

    @property
    def summary(self) -> str:
        """A description in one line."""
        return f"{self.labels} labels, {self.backbone}, {self.settings.steps} steps"

    def method(self, name: str) -> Method:
        """Return the method of that name.

        Raises:
            ValueError: If the recipe has no such method.
        """
        return lookup("method", name, self.methods)

    def with_steps(self, steps: int | None) -> Recipe:
        """Return the recipe with another number of steps, its schedules stretched; unchanged for None."""
        if steps is None:
            return self
        scale = steps / self.settings.steps
        settings = replace(
            self.settings,
            steps=steps,
            warmup=round(self.settings.warmup * scale),
            rampup=round(self.settings.rampup * scale),
        )
        return replace(self, settings=settings)


_SMALL = Settings(
    steps=400, learning_rate=0.03, labelled_batch=32, unlabelled_batch=64, warmup=20, rampup=100
)
_LONGER = replace(_SMALL, steps=1_500, rampup=400)
_LARGE = replace(_SMALL, steps=20_000, labelled_batch=64, unlabelled_batch=192, warmup=500, rampup=5_000)
_SLOW_TEACHER = {**METHODS, "mean-teacher": replace(METHODS["mean-teacher"], kernel="ema(0.999)")}
RECIPES: Mapping[str, Recipe] = {
    recipe.data: recipe
    for recipe in (
        Recipe("digits", 40, "test_resnet", 16, False, _SMALL),
        Recipe("mnist", 100, "test_resnet", 28, False, _SMALL),
        Recipe("fashion-mnist", 100, "test_resnet", 28, True, _LONGER),
        Recipe("cifar10", 4_000, "resnet18(output_stride=8)", 32, True, _LARGE, _SLOW_TEACHER),
    )
}
"""The recipes by the name of their data."""
