"""The recipes of DINO: images, crops, backbone and optimisation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from wmateacher.checks import one_of
from wmateacher.integrations.engine import schedules, settings
from wmateacher.integrations.engine.settings import Hidden, check_at_least
from wmateacher.integrations.vision import digits
from wmateacher.integrations.vision.digits import Domain

__all__ = [
    "DRAWN",
    "OBJECTIVES",
    "PAPER_KERNEL",
    "RECIPES",
    "SHORT_KERNEL",
    "Crops",
    "Range",
    "Recipe",
    "Settings",
    "drawn",
    "photographs",
]

Range = tuple[float, float]

DRAWN = digits.SOURCES
"""The data sets of grey images that are drawn in colour."""
PAPER_KERNEL = "ema(0.996,1.0,schedule=cosine)"
"""A decay that rises from .996 to 1 along a cosine (Caron et al. 2021, section 3.2)."""
SHORT_KERNEL = "ema(0.97)"
"""An EMA with a window of 33 steps, for runs of about 1,000."""

OBJECTIVES: Mapping[str, str | None] = {"dino": None, "byol": "2*cosine", "moco-v3": "0.4*info_nce(0.2)"}
"""The objectives. All but DINO's own are a loss of the registry between predictions and projections."""


@dataclass(frozen=True)
class Crops:
    """The number and the sizes of the crops. The defaults are those of Caron et al. 2021 for 224 pixels.

    Attributes:
        global_size: Height and width of the two global crops, in pixels.
        local_size: Height and width of the local crops, in pixels.
        local_count: Number of local crops.
        global_scale: Range of the share of the image's area that a global crop covers.
        local_scale: Range of the share of the image's area that a local crop covers.

    Raises:
        ValueError: If a size or a scale is out of range.
    """

    global_size: int = 224
    local_size: int = 96
    local_count: int = 8
    global_scale: Range = (0.4, 1.0)
    local_scale: Range = (0.05, 0.4)

    def __post_init__(self) -> None:
        check_at_least(self, global_size=1, local_size=1, local_count=0)
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ValueError(f"{name} must be a range within (0, 1], got {getattr(self, name)}")

    @property
    def sizes(self) -> list[tuple[int, Range]]:
        """The size and the scale of each crop, the two global crops first."""
        return [(self.global_size, self.global_scale)] * 2 + [
            (self.local_size, self.local_scale)
        ] * self.local_count


@dataclass(frozen=True, kw_only=True)
class Settings(settings.Settings):
    """The optimisation of DINO. Defaults without a remark are those of Caron et al. 2021.

    Attributes:
        learning_rate: Learning rate for 256 images per step; the peak is `learning_rate * batch_size / 256`.
        batch_size: Images per step, over all processes.
        hold_last: Steps at the start that do not change the head's last layer (1 epoch in the paper).
        final_learning_rate: Learning rate at the end of the cosine.
        weight_decay: Weight decay at the start, on matrices only.
        final_weight_decay: Weight decay at the end of its cosine.
        outputs: Number of outputs K of the head.
        hidden: Width of the head's MLP.
        bottleneck: Width of the head's normalised layer.
        unit_norm: Keep the rows of the head's last layer at norm 1.
        head_batch_norm: Use batch normalisation in the head's MLP.
        student_temperature: The student's temperature tau_S.
        teacher_temperature: The teacher's temperature tau_T after its warm-up.
        first_teacher_temperature: The teacher's temperature at the start.
        temperature_warmup: Steps until tau_T is reached (30 epochs in the paper).
        centering: `mean`, or `sinkhorn` as in DINOv2.
        center_momentum: Momentum of the mean centring.
        koleo: Weight of KoLeo, which spreads the features of the first global crop; 0.1 in DINOv2.
        ibot: Weight of iBOT's term, which predicts the teacher's outputs at masked patches of global crops
            (Zhou et al. 2022); 1 in iBOT and in DINOv2. It needs a vision transformer.
        patch_head: Whether iBOT's term uses the head of the images, `shared` as in iBOT, or one of its own,
            `separate` as in DINOv2.
        mask_ratio: Range of the share of masked patches of an image.
        mask_probability: Share of the global crops with masked patches.
        objective: `dino`; or `byol` or `moco-v3`, whose student predicts the teacher's projections. They use
            `hidden` and `bottleneck` for projector and predictor, which have batch normalisation, and none
            of the settings of the head's outputs, temperatures and centring.
        precision: `fp32`, or `bf16` for autocast with float32 weights.
    """

    batch_size: int
    hold_last: int
    learning_rate: float = 0.0005
    final_learning_rate: float = 1e-6
    weight_decay: float = 0.04
    final_weight_decay: float = 0.4
    clip_norm: float | None = 3.0
    outputs: int = 65536
    hidden: int = 2048
    bottleneck: int = 256
    unit_norm: bool = True
    head_batch_norm: bool = False
    student_temperature: float = 0.1
    teacher_temperature: float = 0.07
    first_teacher_temperature: float = 0.04
    temperature_warmup: int = 0
    centering: Literal["mean", "sinkhorn"] = "mean"
    center_momentum: float = 0.9
    koleo: float = 0.0
    ibot: float = 0.0
    patch_head: Literal["shared", "separate"] = "shared"
    mask_ratio: Range = (0.1, 0.5)
    mask_probability: float = 0.5
    objective: Literal["dino", "byol", "moco-v3"] = "dino"
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, batch_size=2, hold_last=0, temperature_warmup=0, koleo=0, ibot=0)
        one_of("objective", self.objective, OBJECTIVES)
        one_of("patch_head", self.patch_head, ("shared", "separate"))
        low, high = self.mask_ratio
        if not 0 < low <= high < 1:
            raise ValueError(f"mask_ratio must be a range within (0, 1), got {self.mask_ratio}")
        if not 0 < self.mask_probability <= 1:
            raise ValueError(f"mask_probability must be in (0, 1], got {self.mask_probability}")
        if self.patch_head == "separate" and not self.ibot:
            raise ValueError("patch_head='separate' is the head of iBOT's term, got ibot=0: set ibot=1")
        if self.ibot and self.objective != "dino":
            raise ValueError(f"ibot adds to objective 'dino', got {self.objective!r}: set ibot=0")
        for name in ("first_teacher_temperature", "teacher_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of the optimizer step with index `step`, from 0."""
        peak = self.learning_rate * self.batch_size / 256
        return schedules.warmup_cosine(step, self.steps, self.warmup, peak, self.final_learning_rate)

    def weight_decay_at(self, step: int) -> float:
        """Return the weight decay of the step with index `step`."""
        return schedules.cosine(step, self.steps, self.weight_decay, self.final_weight_decay)

    def teacher_temperature_at(self, step: int) -> float:
        """Return the teacher's temperature of the step with index `step`."""
        return schedules.linear_then_flat(
            step, self.temperature_warmup, self.first_teacher_temperature, self.teacher_temperature
        )


@dataclass(frozen=True)
class Recipe:
    """Pre-train a backbone by DINO and measure its features.

    Attributes:
        summary: A description in one line.
        data: Grey images drawn in `domain`: `digits`, `mnist` or `fashion-mnist`. Or photographs: `cifar10`,
            or `imagefolder:DIR` with one folder per class in DIR/train and in DIR/val.
        backbone: A timm network with its arguments, such as `vit_tiny_patch16_224(patch_size=4,depth=4)`.
        image_size: Height and width of drawings, and of images in evaluation, in pixels.
        crops: The crops of every image.
        settings: The optimisation.
        epochs: Passes over the images. They determine `settings.steps` and `settings.hold_last`, and other
            lengths in steps change in proportion. None keeps the settings.
        domain: The domain that grey images are drawn in.
        redraw: First and last step of a ramp, over which the share of crops with their own colours and angle
            rises from 0 to 1.
        train_images: Largest number of training images.
        bank_images: Largest number of images of each split that are drawn for evaluation.
    """

    summary: Hidden[str]
    data: str
    backbone: str
    image_size: int
    crops: Crops
    settings: Settings
    epochs: int | None = None
    domain: Domain = digits.WIDE
    redraw: tuple[int, int] = (0, 0)
    train_images: int = 10**9
    bank_images: int = 10**9

    @property
    def drawn(self) -> bool:
        """Whether grey images are drawn, rather than photographs read."""
        return self.data in DRAWN

    @property
    def kernel(self) -> str:
        """The default kernel: the paper's for photographs, and an EMA with a shorter window for drawings.

        In such short runs, a teacher with the paper's kernel remembers too much of the random start.
        """
        return SHORT_KERNEL if self.drawn else PAPER_KERNEL

    def with_steps(self, steps: int | None) -> Recipe:
        """Return the recipe with another number of steps, its schedules stretched; unchanged for None."""
        if steps is None:
            return self
        scale = steps / self.settings.steps
        first, last = self.redraw
        stretched = {n: round(getattr(self.settings, n) * scale) for n in ("warmup", "temperature_warmup")}
        settings = replace(self.settings, steps=steps, **stretched)
        redraw = (round(first * scale), round(last * scale))
        return replace(self, settings=settings, redraw=redraw, epochs=None)

    def resolve(self, images: int) -> Recipe:
        """Return the recipe with the number of steps that `epochs` passes over `images` images take."""
        epoch = images // self.settings.batch_size
        if self.epochs is None or epoch == 0 or self.epochs * epoch == self.settings.steps:
            return self
        made = self.with_steps(self.epochs * epoch)
        return replace(made, settings=replace(made.settings, hold_last=epoch), epochs=self.epochs)


# An untrained network hardly sees shapes for colours. Its answers to two crops must agree by more than
# tau_T / tau_S, or what they agree on fades. So the first crops share their drawing, and tau_T is low.
# A part of a digit is a part of other digits, too: the crops are nearly whole, and there are no local ones.
_DIGITS = Recipe(
    summary="the bundled digits in random colours, turned and noisy; minutes on a CPU",
    data="digits",
    backbone="test_efficientnet_gn(output_stride=8)",
    image_size=24,
    crops=Crops(24, 16, 0, (0.85, 1.0), (0.4, 0.7)),
    settings=Settings(
        steps=1000,
        batch_size=64,
        warmup=100,
        hold_last=20,
        learning_rate=0.008,
        outputs=128,
        hidden=256,
        bottleneck=64,
        first_teacher_temperature=0.02,
        teacher_temperature=0.02,
        centering="sinkhorn",
    ),
    redraw=(40, 470),
    bank_images=10000,
)


def drawn(data: str = "digits", steps: int | None = None) -> Recipe:
    """Return the recipe for grey images drawn in random colours, turned and noisy, small enough for a CPU.

    Args:
        data: `"digits"`, `"mnist"` or `"fashion-mnist"`.
        steps: The number of steps. The warm-up and the share of redrawn crops are stretched with it.
    """
    names = {
        "digits": _DIGITS.summary,
        "mnist": "MNIST in random colours, turned and noisy",
        "fashion-mnist": "Fashion-MNIST in random colours, turned and noisy",
    }
    return replace(_DIGITS, data=data, summary=names[data]).with_steps(steps)


def photographs(
    data: str,
    count: int,
    backbone: str | None = None,
    epochs: int = 100,
    batch_size: int | None = None,
) -> Recipe:
    """Return the recipe of Caron et al. 2021, for CIFAR-10 with smaller images, crops and network.

    Args:
        data: `"cifar10"` or `"imagefolder:DIR"`.
        count: The number of training images.
        backbone: The timm network. Default: ViT-S/16, or a small ViT for CIFAR-10.
        epochs: Passes over the images. The warm-up takes 10% of them, that of the temperature 30%.
        batch_size: Images per step. Default: 1024 as in the paper, or 256 for CIFAR-10.
    """
    small = data == "cifar10"
    batch_size = min(batch_size or (256 if small else 1024), count)
    epoch = count // batch_size
    settings = Settings(
        steps=epochs * epoch,
        batch_size=batch_size,
        warmup=round(10 * epochs / 100 * epoch),
        hold_last=epoch,
        temperature_warmup=round(30 * epochs / 100 * epoch),
        outputs=4096 if small else 65536,
    )
    if small:
        backbone = backbone or "vit_tiny_patch16_224(patch_size=4,drop_path_rate=0.1)"
        return Recipe(
            "photographs of 32 pixels and a small ViT", data, backbone, 32, Crops(32, 16, 6), settings, epochs
        )
    backbone = backbone or "vit_small_patch16_224(drop_path_rate=0.1)"
    summary = "the paper's recipe: ViT-S/16 on a folder of photographs, --data imagefolder:DIR"
    return Recipe(summary, data, backbone, 224, Crops(), settings, epochs)


RECIPES: Mapping[str, Recipe] = {
    **{data: drawn(data) for data in DRAWN},
    "cifar10": photographs("cifar10", 48_000),
    "imagefolder": photographs("imagefolder:DIR", 1_217_109),
}
"""The recipes by name. `imagefolder` is sized for ImageNet without the 5% that is held out."""
