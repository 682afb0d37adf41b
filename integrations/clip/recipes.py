"""The recipes of fine-tuning CLIP: towers, images, methods and optimisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

from wmateacher.checks import lookup, one_of
from wmateacher.integrations.clip import paper
from wmateacher.integrations.clip.data import imagenet
from wmateacher.integrations.clip.data.batches import Pairing, Sampling, check_templates
from wmateacher.integrations.clip.methods import METHODS, TRACER_TERMS, Method, tracer_terms
from wmateacher.integrations.engine import settings
from wmateacher.integrations.engine.sampling import steps_per_epoch
from wmateacher.integrations.engine.settings import Hidden
from wmateacher.integrations.vision import digits
from wmateacher.integrations.vision.digits import Domain

__all__ = [
    "RECIPES",
    "DigitsRecipe",
    "EmojiRecipe",
    "FolderRecipe",
    "OwnSettings",
    "PhotoRecipe",
    "PretrainedRecipe",
    "PretrainingRecipe",
    "Recipe",
    "Settings",
    "get",
]

RecipeT = TypeVar("RecipeT", bound="Recipe")
PretrainedT = TypeVar("PretrainedT", bound="PretrainedRecipe")
PretrainingT = TypeVar("PretrainingT", bound="PretrainingRecipe")


@dataclass(frozen=True, kw_only=True)
class Settings(settings.Settings):
    """How a run is optimised: AdamW, a linear warm-up, then a cosine decay to 0.

    Attributes:
        steps: Number of optimizer steps T.
        learning_rate: The learning rate at the end of the warm-up.
        batch_size: Image-text pairs per step.
        weight_decay: The weight decay of every parameter, in one group as in the published code.
        warmup: Steps of linear warm-up; 500 in the published recipes.
        clip_norm: The largest gradient norm, or None for no clipping.
        precision: `fp32`, or autocast to `bf16` or `fp16` with float32 weights. fp16 uses a gradient scaler,
            and the teacher does not count the steps that it skips.
        grad_checkpointing: Recompute activations in the backward pass instead of keeping them.
        micro_batch: Pairs that go through the towers at a time on each process, or None for all. It saves
            memory and costs a second forward pass; the losses still see the whole batch.
        compile: Compile the forward pass of student and teacher with `torch.compile`.
        seed: The seed of initialisation, dropout and data.
        checkpoint_every: Steps between checkpoints.
        freeze_text: Train the image tower and the logit scale only.
    """

    precisions = ("fp32", "bf16", "fp16")

    batch_size: int
    weight_decay: float = 0.1
    warmup: int = 500
    grad_checkpointing: bool = False
    micro_batch: int | None = None
    compile: bool = False
    freeze_text: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        settings.check_at_least(self, batch_size=1)
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1, got {self.micro_batch}: None is all at once")

    def scaled(self, steps: int | None) -> Settings:
        """Return the settings for another number of steps, the warm-up in proportion; unchanged for None."""
        if steps is None:
            return self
        return replace(self, steps=steps, warmup=self.warmup * steps // self.steps)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Fine-tune a CLIP by several methods and evaluate it under shift.

    Attributes:
        name: The name on the command line.
        summary: A description of the experiment, in one line.
        model: The towers: `tiny-conv-32`, `tiny-vit-16`, `tiny-resnet-32`, `light-vit-28`, or any model of
            open_clip.
        finetune: Settings of the fine-tuning, shared by all methods.
        methods: The methods by name; their settings may differ from the published ones.
        default: The names of the methods that run by default; all if empty.
        evaluate_every: Optimizer steps between evaluations of student and teacher during training; 0
            evaluates at the end only.
        published: The name of the paper's figures for this experiment, in `paper`.
    """

    name: Hidden[str]
    summary: Hidden[str]
    model: str
    finetune: Settings
    methods: Mapping[str, Method]
    default: Hidden[tuple[str, ...]] = ()
    evaluate_every: int | None = 0
    published: Hidden[str | None] = None

    def __post_init__(self) -> None:
        if self.evaluate_every is not None and self.evaluate_every < 0:
            raise ValueError(
                f"evaluate_every must be at least 0, got {self.evaluate_every}: 0 is at the end only"
            )
        if self.published is not None:
            lookup("published", self.published, {**paper.PUBLISHED, **paper.FORGETTING})

    def method(self, name: str) -> Method:
        """Return the method of that name, with this recipe's settings.

        Raises:
            ValueError: If the recipe has no such method.
        """
        return lookup("method", name, self.methods)

    def select(self, names: Sequence[str]) -> list[str]:
        """Return the names of the methods to run: these, all for `("all",)`, the default for none.

        Raises:
            ValueError: If the recipe does not have one of them.
        """
        if tuple(names) == ("all",):
            return list(self.methods)
        selected = list(names or self.default or self.methods)
        for name in selected:
            self.method(name)
        return selected

    def trained(self, name: str) -> Method:
        """Return the method that `name` trains: itself, or the one that it merges."""
        method = self.method(name)
        return method if method.merge is None else self.method(method.merge.of)

    def why_not(self, name: str, *, labelled: bool, anchored: bool) -> str | None:
        """Return the reason why a method cannot run on some data, or None if it can.

        Args:
            name: The name of the method.
            labelled: Whether the training pairs have labels.
            anchored: Whether there are anchor pairs.
        """
        method = self.trained(name)
        if self.method(name).merge is not None and not method.trains:
            return f"merge of {method.name!r}, which is not trained: choose a method that is"
        if method.head == "linear" and method.trains and not labelled:
            return (
                f"method {name!r} has a linear head and needs labels, the data has captions only: add a "
                "label column to the table, or leave the method out"
            )
        if method.anchors and not anchored:
            return (
                f"method {name!r} needs anchor pairs, image-text pairs like those of pre-training: name some "
                "(--anchors FILE), or leave the method out"
            )
        return None

    def adjust(self: RecipeT) -> RecipeT:
        """Return the recipe with the values that follow from those changed on the command line."""
        return self

    def with_steps(self: RecipeT, steps: int | None) -> RecipeT:
        """Return the recipe with another number of fine-tuning steps and the warm-up in proportion."""
        return replace(self, finetune=self.finetune.scaled(steps))


def _check_captions(recipe: Recipe) -> None:
    """Check that no method has ImageNet's captions, in a recipe with captions of its own."""
    for method in recipe.methods.values():
        if method.templates != "openai":
            raise ValueError(
                f"method {method.name!r} has templates={method.templates!r}, which are for ImageNet's "
                f"classes: leave them out for recipe {recipe.name!r}, which has captions of its own"
            )


@dataclass(frozen=True, kw_only=True)
class PretrainingRecipe(Recipe):
    """Pre-train a small CLIP before it is fine-tuned.

    Attributes:
        pretrain: Settings of the pre-training, which is plain contrastive learning.
    """

    pretrain: Settings

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_captions(self)
        if ":" in self.model:
            raise ValueError(
                f"model must be the name of towers, got {self.model!r}, which has weights: this recipe "
                "pre-trains its own"
            )

    def with_pretraining(self: PretrainingT, steps: int | None) -> PretrainingT:
        """Return the recipe with another number of pre-training steps and the warm-up in proportion."""
        return replace(self, pretrain=self.pretrain.scaled(steps))


# --- drawn digits -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DigitsRecipe(PretrainingRecipe):
    """Pre-train a small CLIP on digits of one domain and fine-tune it on another.

    Attributes:
        data: The images: `digits`, or `mnist` or `fashion-mnist` from the data root.
        wide: The pre-training domain.
        narrow: The fine-tuning domain, which is in-distribution at evaluation.
        shifts: The test domains.
        train_images: The largest number of training images to use.
        large_data_steps: Pre-training steps if `data` is changed to a source of 60,000 images.
    """

    data: str
    wide: Hidden[Domain]
    narrow: Hidden[Domain]
    shifts: Hidden[Mapping[str, Domain]]
    train_images: int = 10**9
    large_data_steps: Hidden[int | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("data", self.data, digits.SOURCES)

    def adjust(self) -> DigitsRecipe:
        """Return the recipe with more steps of pre-training if `data` was changed to larger data.

        A number of steps that was changed is kept.
        """
        before = RECIPES.get(self.name)
        if not isinstance(before, DigitsRecipe) or self.pretrain.steps != before.pretrain.steps:
            return self
        is_larger = self.data not in (before.data, "digits")
        return self.with_pretraining(self.large_data_steps) if is_larger else self


DIGITS = DigitsRecipe(
    name="digits",
    summary="digits in random colours, rotations and noise -> red and blue digits -> six shifts",
    data="digits",
    model="tiny-conv-32",
    wide=digits.WIDE,
    narrow=digits.NARROW,
    shifts=digits.SHIFTS,
    pretrain=Settings(steps=1000, learning_rate=3e-3, batch_size=128, warmup=100, clip_norm=1.0),
    finetune=Settings(steps=400, learning_rate=2e-3, batch_size=128, warmup=40, clip_norm=1.0),
    # All methods share one learning rate. LP-FT's probing rate is the best of 1, 10 and 100 times that, on
    # validation images of the fine-tuning domain. CaRot's teacher is updated as often per run as the
    # published one.
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
    """Return ink and paper after the channels of pixels of mean 0 are multiplied by `factors`."""
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
            # The script's pull is 1e-3 |W - W^0|^2 on everything, and it keeps the weight decay.
            replace(METHODS["l2-sp"], l2_sp=2e-3, l2_sp_of="all", weight_decay=None),
            _toy("static-sd", distillation="crd", distill_weight=2.0),
            _toy("tracer", distillation="crd", distill_weight=2.0),
        )
    },
    train_images=48_000,
    published="colored-mnist",
)


# --- pictograms -------------------------------------------------------------------------------------


def _with_batch_statistics(methods: Mapping[str, Method]) -> dict[str, Method]:
    """Return methods whose moving teachers normalise by the batch where they have batch normalisation."""
    return {
        name: m if m.kernel in (None, "static") else replace(m, batch_norm="batch")
        for name, m in methods.items()
    }


@dataclass(frozen=True, kw_only=True)
class EmojiRecipe(PretrainingRecipe):
    """Pre-train a small CLIP on pictograms by several hands, and fine-tune it on those by one of them.

    Attributes:
        style: The style of fine-tuning, which is in-distribution at evaluation.
        shifts: The styles that only pre-training sees.
    """

    style: str
    shifts: tuple[str, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        styles = (self.style, *self.shifts)
        if not self.shifts or len(set(styles)) < len(styles):
            raise ValueError(f"shifts must be styles other than {self.style!r}, each once, got {self.shifts}")


EMOJI = EmojiRecipe(
    name="emoji",
    summary="pictograms by five hands with their names -> the 56 kinds in one hand -> the other four hands",
    model="small-conv-48",
    style="twemoji",
    shifts=("noto", "openmoji", "sketch", "fluent"),
    pretrain=Settings(steps=1500, learning_rate=2e-3, batch_size=128, warmup=100, clip_norm=1.0),
    finetune=Settings(steps=300, learning_rate=1e-3, batch_size=64, warmup=30, clip_norm=1.0),
    methods=_with_batch_statistics(DIGITS.methods),
    default=DIGITS.default,
)

# --- photographs ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PretrainedRecipe(Recipe):
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

    def adjust(self: PretrainedT) -> PretrainedT:
        """Return the recipe without its own `pretrained` if `model` was changed to one with its weights."""
        before = RECIPES.get(self.name)
        unchanged = isinstance(before, PretrainedRecipe) and self.pretrained == before.pretrained
        return replace(self, pretrained=None) if ":" in self.model and unchanged else self


@dataclass(frozen=True, kw_only=True)
class PhotoRecipe(PretrainedRecipe):
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


_IMAGENET = (
    _imagenet("imagenet-vit-b-16", "ViT-B-16", 512, 512),
    _imagenet("imagenet-vit-l-14", "ViT-L-14", 768, 224),
    _imagenet(
        "imagenet-rn50", "RN50", 1024, 512,
        learning_rate=9e-6, weight_decay=0.02, elementwise=200.0, c_f=0.01, distill_weight=0.01,
    ),
)  # fmt: skip


# --- your own images --------------------------------------------------------------------------------


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
class FolderRecipe(PretrainedRecipe):
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
        epochs: Passes over the training images, unless `finetune.steps` is given.
        min_steps: The least number of steps: few images are passed over more often.
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
        _check_captions(self)
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
    methods=_with_batch_statistics(METHODS),
    default=("zero-shot", "flyp", "tracer"),
)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe for recipe in (DIGITS, COLORED_MNIST, EMOJI, *_IMAGENET, FOLDERS)
}
"""The recipes by name."""


def get(name: str) -> Recipe:
    """Return the recipe of that name.

    Raises:
        ValueError: If there is no such recipe; the message lists the recipes.
    """
    return lookup("recipe", name, RECIPES)
