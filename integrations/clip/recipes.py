"""Experiments as data: which towers, which images drawn how, which methods, how optimised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from wmateacher.integrations import digits
from wmateacher.integrations.clip.methods import METHODS, Method
from wmateacher.integrations.clip.training import Settings
from wmateacher.integrations.digits import Domain
from wmateacher.spec import nearest


@dataclass(frozen=True)
class Recipe:
    """Pre-train a small CLIP on one domain, fine-tune it on another, evaluate under shift.

    Attributes:
        name: On the command line.
        summary: One line.
        data: A source of `wmateacher.integrations.digits`.
        model: Towers that `towers.build` knows.
        wide: The pre-training domain.
        narrow: The fine-tuning domain, and in-distribution at evaluation.
        shifts: The test domains.
        pretrain: How to pre-train, by plain contrastive learning.
        finetune: How every method is fine-tuned.
        methods: By name; their settings may differ from the published ones.
        default: Names of those that run where none are asked for; empty: all.
        train_images: At most that many training images are used.
        large_data_steps: Pre-training steps where `with_data` changes to a source of 60,000 images.
        published_forgetting: What the paper reports, in points of accuracy on the first shift.
    """

    name: str
    summary: str
    data: str
    model: str
    wide: Domain
    narrow: Domain
    shifts: Mapping[str, Domain]
    pretrain: Settings
    finetune: Settings
    methods: Mapping[str, Method]
    default: tuple[str, ...] = ()
    train_images: int = 10**9
    large_data_steps: int | None = None
    published_forgetting: Mapping[str, float] = field(default_factory=dict)

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
        return [self.method(name).name for name in names or self.default or self.methods]

    def with_data(self, data: str) -> Recipe:
        """The same on other images; sources larger than the bundled one are pre-trained on for longer."""
        larger = self.large_data_steps if data not in (self.data, "digits") else None
        return replace(self, data=data, pretrain=_with_steps(self.pretrain, larger))

    def with_steps(self, pretrain: int | None, finetune: int | None) -> Recipe:
        """The same with other numbers of optimizer steps, the warm-up shortened in proportion."""
        return replace(
            self,
            pretrain=_with_steps(self.pretrain, pretrain),
            finetune=_with_steps(self.finetune, finetune),
        )


def _with_steps(settings: Settings, steps: int | None) -> Settings:
    if steps is None or steps < 1:
        return settings if steps is None else replace(settings, steps=steps)
    return replace(settings, steps=steps, warmup=settings.warmup * steps // settings.steps)


_DIGITS = Recipe(
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


_COLORED_MNIST = Recipe(
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
            _toy("static-sd", distillation="crd", strength=2.0),
            _toy("tracer", distillation="crd", strength=2.0),
        )
    },
    train_images=48_000,
    published_forgetting={"flyp": 37.9, "l2-sp": 13.6, "static-sd": 1.8, "tracer": 0.1},
)

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (_DIGITS, _COLORED_MNIST)}


def get(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ValueError: There is none; lists those there are.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; {nearest(name, RECIPES)}")
    return RECIPES[name]
