"""Recipes on drawn digits: the default one, and the paper's toy experiment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from wmateacher.checks import one_of
from wmateacher.integrations.clip.methods import METHODS, Method
from wmateacher.integrations.clip.recipes.base import RECIPES, FromScratchRecipe, Settings
from wmateacher.integrations.engine.settings import Hidden
from wmateacher.integrations.vision import digits
from wmateacher.integrations.vision.digits import Domain

__all__ = ["COLORED_MNIST", "DIGITS", "DigitsRecipe"]


@dataclass(frozen=True, kw_only=True)
class DigitsRecipe(FromScratchRecipe):
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


def __dir__() -> list[str]:
    return __all__
