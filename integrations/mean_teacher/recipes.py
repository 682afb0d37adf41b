"""Experiments as data: which images, how many labels, which network, how optimised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from wmateacher.checks import nearest
from wmateacher.integrations.mean_teacher.methods import METHODS, Method
from wmateacher.integrations.mean_teacher.training import Settings
from wmateacher.integrations.vision.images import SOURCES


@dataclass(frozen=True)
class Recipe:
    """Train a classifier from few labels and many images.

    Attributes:
        data: A source of `wmateacher.integrations.vision.images`.
        labels: Number of labelled images, the same of each class.
        backbone: A spec of `backbones.build`.
        image_size: Height and width, in pixels.
        flip: Views may be mirrored: right for photographs and clothes, wrong for digits.
        settings: How every method is optimised.
        methods: By name.
    """

    data: str
    labels: int
    backbone: str
    image_size: int
    flip: bool
    settings: Settings
    methods: Mapping[str, Method] = field(default_factory=lambda: dict(METHODS))

    def method(self, name: str) -> Method:
        """The method of that name, as this recipe sets it.

        Raises:
            ValueError: The recipe has none of that name.
        """
        if name not in self.methods:
            raise ValueError(f"unknown method {name!r}; {nearest(name, self.methods)}")
        return self.methods[name]

    def with_steps(self, steps: int | None) -> Recipe:
        """The same with another length, warm-up and ramp-up stretched with it; None: as it is."""
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
_LARGE = replace(_SMALL, steps=20_000, labelled_batch=64, unlabelled_batch=192, warmup=500, rampup=5_000)
_RECIPES = {
    "digits": Recipe("digits", 40, "test_resnet", 16, False, _SMALL),
    "mnist": Recipe("mnist", 100, "test_resnet", 28, False, _SMALL),
    "fashion-mnist": Recipe(
        "fashion-mnist", 100, "test_resnet", 28, True, replace(_SMALL, steps=1_500, rampup=400)
    ),
    "cifar10": Recipe(
        "cifar10",
        4_000,
        "resnet18(output_stride=8)",
        32,
        True,
        _LARGE,
        {**METHODS, "mean-teacher": replace(METHODS["mean-teacher"], kernel="ema(0.999)")},
    ),
}


def get(data: str) -> Recipe:
    """The recipe for that data.

    Raises:
        ValueError: There is none; lists those there are.
    """
    if data not in _RECIPES:
        raise ValueError(f"unknown data {data!r}; {nearest(data, SOURCES)}")
    return _RECIPES[data]
