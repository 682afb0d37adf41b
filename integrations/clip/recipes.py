"""Experiments as data: which towers, which images, which methods, how optimised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from wmateacher.checks import nearest
from wmateacher.integrations.clip.data import imagenet
from wmateacher.integrations.clip.data.photos import Sampling
from wmateacher.integrations.clip.methods import METHODS, Method, tracer_terms
from wmateacher.integrations.clip.paper import PUBLISHED
from wmateacher.integrations.clip.training import Settings
from wmateacher.integrations.engine import overrides
from wmateacher.integrations.engine.sampling import steps_per_epoch
from wmateacher.integrations.vision import digits
from wmateacher.integrations.vision.digits import Domain

RecipeT = TypeVar("RecipeT", bound="Recipe")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Fine-tune a CLIP by several methods, and evaluate under shift.

    Attributes:
        name: On the command line.
        summary: One line.
        model: Towers that `towers.build` knows.
        finetune: How every method is fine-tuned.
        methods: By name; their settings may differ from the published ones.
        default: Names of those that run where none are asked for; empty: all.
        evaluate_every: Optimizer steps between evaluations of student and teacher while training; 0: at
            the end only.
    """

    name: str
    summary: str
    model: str
    finetune: Settings
    methods: Mapping[str, Method]
    default: tuple[str, ...] = ()
    evaluate_every: int | None = 0

    def __post_init__(self) -> None:
        if self.evaluate_every is not None and self.evaluate_every < 0:
            raise ValueError(
                f"evaluate_every must be at least 0, got {self.evaluate_every}: 0 is at the end only"
            )

    def method(self, name: str) -> Method:
        """The method of that name, as this recipe sets it.

        Raises:
            ValueError: The recipe has none of that name.
        """
        if name not in self.methods:
            raise ValueError(f"unknown method {name!r}; {nearest(name, self.methods)}")
        return self.methods[name]

    def chosen(self, names: tuple[str, ...]) -> list[str]:
        """The names of methods to run: these, all for `("all",)`, the recipe's default for none.

        Raises:
            ValueError: The recipe has none of that name.
        """
        if names == ("all",):
            return list(self.methods)
        chosen = list(names or self.default or self.methods)
        for name in chosen:
            self.method(name)
        return chosen

    def trained(self, name: str) -> Method:
        """The method that is trained for that one: itself, or what a merge is of."""
        method = self.method(name)
        return method if method.merge is None else self.method(method.merge.of)

    def lacking(self, name: str, *, labelled: bool, anchored: bool) -> str | None:
        """Why a method cannot run on some data; None: it can.

        Args:
            name: Of the method.
            labelled: Whether the training pairs have classes.
            anchored: Whether there are anchor pairs.
        """
        method = self.trained(name)
        if self.method(name).merge is not None and not method.trains:
            return f"merge of {method.name!r}, which is not trained: choose a method that is"
        if method.head == "linear" and method.trains and not labelled:
            return (
                f"method {name!r} has a linear head and needs labels, the data has captions only: give the "
                "table a label column, or leave the method out"
            )
        if method.anchors and not anchored:
            return (
                f"method {name!r} needs anchor pairs, image-text pairs like those of pre-training: give some "
                "(--set anchors=FILE), or leave the method out"
            )
        return None

    def changed(self: RecipeT, *assignments: str) -> RecipeT:
        """The same with values changed, as `overrides.changed` does.

        Raises:
            ValueError: There is no such name, or the value does not do.
        """
        return overrides.changed(self, assignments)

    def with_steps(self: RecipeT, steps: int | None) -> RecipeT:
        """The same with another number of steps of fine-tuning, the warm-up shortened in proportion."""
        return replace(self, finetune=scaled(self.finetune, steps))


def scaled(settings: Settings, steps: int | None) -> Settings:
    """Other steps, the warm-up in proportion; None: as they are."""
    if steps is None or steps < 1:
        return settings if steps is None else replace(settings, steps=steps)
    return replace(settings, steps=steps, warmup=settings.warmup * steps // settings.steps)


# --- drawn digits -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DigitsRecipe(Recipe):
    """Pre-train a small CLIP on digits of one domain, and fine-tune it on another.

    Attributes:
        data: A source of `wmateacher.integrations.vision.digits`.
        wide: The pre-training domain.
        narrow: The fine-tuning domain, and in-distribution at evaluation.
        shifts: The test domains.
        pretrain: How to pre-train, by plain contrastive learning.
        train_images: At most that many training images are used.
        large_data_steps: Pre-training steps where `with_data` changes to a source of 60,000 images.
        published_forgetting: What the paper reports, in points of accuracy on the first shift.
    """

    data: str
    wide: Domain
    narrow: Domain
    shifts: Mapping[str, Domain]
    pretrain: Settings
    train_images: int = 10**9
    large_data_steps: int | None = None
    published_forgetting: Mapping[str, float] = field(default_factory=dict)

    def with_data(self, data: str) -> DigitsRecipe:
        """The same on other images; sources larger than the bundled one are pre-trained on for longer."""
        larger = self.large_data_steps if data not in (self.data, "digits") else None
        return replace(self, data=data, pretrain=scaled(self.pretrain, larger))

    def with_pretraining(self, steps: int | None) -> DigitsRecipe:
        """The same with another number of steps of pre-training, the warm-up shortened in proportion."""
        return replace(self, pretrain=scaled(self.pretrain, steps))


DIGITS = DigitsRecipe(
    name="digits",
    summary="any digits: random colours, turns and noise -> red and blue digits -> six shifts",
    data="digits",
    model="tiny-conv-32",
    wide=digits.WIDE,
    narrow=digits.NARROW,
    shifts=digits.SHIFTS,
    pretrain=Settings(steps=1000, learning_rate=3e-3, batch_size=128, warmup=100, clip_norm=1.0),
    finetune=Settings(steps=400, learning_rate=2e-3, batch_size=128, warmup=40, clip_norm=1.0),
    # One learning rate for all; LP-FT's probing rate is the best of 1, 10 and 100 times it on validation
    # images of the fine-tuning domain; CaRot's teacher is updated as often in a run as in the published one.
    methods={
        **METHODS,
        "ft": replace(METHODS["ft"], rate=1.0),
        "lp-ft": replace(METHODS["lp-ft"], probe_rate=1.0),
        "carot": replace(METHODS["carot"], update_every=8),
    },
    default=("zero-shot", "flyp", "l2-sp", "static-sd", "ema", "tracer"),
    large_data_steps=3000,
)

_MNIST_MEAN = 0.1307


def _tinted(factors: tuple[float, float, float]) -> tuple[digits.Colour, digits.Colour]:
    """Ink and paper after multiplying the channels of pixels normalised to mean 0 by `factors`."""
    ink = tuple(_MNIST_MEAN + f * (1 - _MNIST_MEAN) for f in factors)
    paper = tuple(_MNIST_MEAN * (1 - f) for f in factors)
    return ink, paper  # type: ignore[return-value]


_RED, _BLUE = _tinted((0.8, 0.2, 0.2)), _tinted((0.2, 0.2, 0.8))
_PLAIN = Domain(ink=(digits.WHITE, digits.WHITE), paper=(digits.BLACK, digits.BLACK))


def _toy(name: str, **changes: object) -> Method:
    return replace(METHODS[name], cross_frobenius=0.0, **changes)  # type: ignore[arg-type]


COLORED_MNIST = DigitsRecipe(
    name="colored-mnist",
    summary="the paper's toy experiment: MNIST -> red and blue MNIST -> accuracy left on MNIST",
    data="mnist",
    model="light-vit-28",
    wide=_PLAIN,
    narrow=Domain(ink=(_RED[0], _BLUE[0]), paper=(_RED[1], _BLUE[1]), agreement=0.95),
    shifts={"original": _PLAIN},
    pretrain=Settings(steps=3750, learning_rate=5e-4, batch_size=128, warmup=100),
    finetune=Settings(steps=3750, learning_rate=1e-4, batch_size=128, warmup=100, freeze_text=True),
    methods={
        method.name: method
        for method in (
            METHODS["zero-shot"],
            METHODS["flyp"],
            replace(METHODS["l2-sp"], l2_sp=1e-3),
            _toy("static-sd", distillation="crd", distill_weight=2.0),
            _toy("tracer", distillation="crd", distill_weight=2.0),
        )
    },
    train_images=48_000,
    published_forgetting={"flyp": 37.9, "l2-sp": 13.6, "static-sd": 1.8, "tracer": 0.1},
)


# --- photographs ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PhotoRecipe(Recipe):
    """Fine-tune a pretrained CLIP on image-text pairs from files; evaluate on ImageNet and its shifts.

    Attributes:
        pretrained: A tag of open_clip, or a checkpoint file; None: random weights.
        train: Pairs that `captioned.load` knows.
        anchors: Pairs like those of pre-training, likewise, for methods that need them.
        tests: Sets of `imagenet.SETS`; the first is in-distribution.
        templates: Captions with one `{}`, of training and of the zero-shot head.
        epochs: Passes over the training pairs; None: `finetune.steps` says how long.
        sampling: How batches are drawn: see `file_pairs.FilePairs`.
        scale: Smallest and largest share of an image that a training crop has.
        flip: Probability of a horizontal flip.
        evaluate_every: None: after each epoch.
        evaluation_batch: Images at a time in evaluation.
        published: The rows of `published.PUBLISHED` that it reproduces; None: none.
    """

    pretrained: str | None
    train: str = "imagenet-train"
    anchors: str | None = None
    tests: tuple[str, ...] = ("imagenet", *imagenet.SHIFTS)
    templates: tuple[str, ...] = imagenet.TEMPLATES
    epochs: int | None = 10
    sampling: Sampling = "epochs"
    scale: tuple[float, ...] = (0.9, 1.0)
    flip: float = 0.5
    evaluate_every: int | None = None
    evaluation_batch: int = 256
    published: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.tests:
            if name not in imagenet.SETS:
                raise ValueError(f"unknown data set {name!r} in tests; {nearest(name, imagenet.SETS)}")
        if not self.tests:
            raise ValueError("tests must have at least one data set: the first is in-distribution")
        wrong = [t for t in self.templates if not _takes_a_name(t)]
        if wrong or not self.templates:
            raise ValueError(
                f"templates must be captions with one {{}} for the class, got {wrong or self.templates!r}"
            )
        if self.published is not None and self.published not in PUBLISHED:
            raise ValueError(f"unknown published {self.published!r}; {nearest(self.published, PUBLISHED)}")
        if self.evaluation_batch < 1:
            raise ValueError(f"evaluation_batch must be at least 1, got {self.evaluation_batch}")
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must be two shares of an image such as (0.9, 1.0), got {self.scale}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip must be a probability, got {self.flip}")

    def on(self, pairs: int) -> PhotoRecipe:
        """The same with the steps that so many training pairs make.

        Raises:
            ValueError: The warm-up is not shorter than that.
        """
        each = steps_per_epoch(pairs, self.finetune.batch_size)
        steps = self.finetune.steps if self.epochs is None else self.epochs * each
        warmup = self.finetune.warmup
        if warmup and warmup >= steps:
            raise ValueError(
                f"warmup must be shorter than the run, got {warmup} of {steps} steps ({pairs:,} pairs in "
                f"batches of {self.finetune.batch_size}): pass --set finetune.warmup={steps // 10}"
            )
        every = each if self.evaluate_every is None else self.evaluate_every
        return replace(self, finetune=replace(self.finetune, steps=steps), evaluate_every=every)

    def changed(self, *assignments: str) -> PhotoRecipe:
        """As `Recipe.changed`; `finetune.steps` takes the place of `epochs`."""
        made = super().changed(*assignments)
        names = [a.partition("=")[0].strip() for a in assignments]
        return replace(made, epochs=None) if "finetune.steps" in names else made

    def with_steps(self, steps: int | None) -> PhotoRecipe:
        """As `Recipe.with_steps`, in place of `epochs`."""
        return self if steps is None else replace(super().with_steps(steps), epochs=None)


def _takes_a_name(template: str) -> bool:
    try:
        return template.count("{}") == 1 and template.format("x") == template.replace("{}", "x")
    except (LookupError, ValueError):
        return False


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
    """A published recipe: AdamW, 500 steps of warm-up, a cosine, 10 epochs, bf16."""
    pairs = imagenet.SETS["imagenet-train"].images
    distillation = tracer_terms(width, elementwise)
    regularised = ("static-sd", "ema", "carot", "tracer")
    methods = {n: replace(m, cross_frobenius=c_f) if n in regularised else m for n, m in METHODS.items()}
    for teacher in ("static-sd", "ema", "tracer"):
        methods[teacher] = replace(methods[teacher], distillation=distillation, distill_weight=distill_weight)
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
        published=name.removeprefix("imagenet-"),
    )  # fmt: skip


_IMAGENET = (
    _imagenet("imagenet-vit-b-16", "ViT-B-16", 512, 512),
    _imagenet("imagenet-vit-l-14", "ViT-L-14", 768, 224),
    _imagenet(
        "imagenet-rn50", "RN50", 1024, 512,
        learning_rate=9e-6, weight_decay=0.02, elementwise=200.0, c_f=0.01, distill_weight=0.01,
    ),
)  # fmt: skip

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (DIGITS, COLORED_MNIST, *_IMAGENET)}


def get(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ValueError: There is none; lists those there are.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; {nearest(name, RECIPES)}")
    return RECIPES[name]
