"""Experiments as data: which images, cut how, which backbone, how optimised."""

from __future__ import annotations

from dataclasses import dataclass, replace

from wmateacher.integrations.dino.crops import Crops
from wmateacher.integrations.dino.training import Settings
from wmateacher.integrations.vision import digits
from wmateacher.integrations.vision.digits import Domain

DRAWN = digits.SOURCES


@dataclass(frozen=True)
class Recipe:
    """Pre-train a backbone by DINO and measure its features.

    Attributes:
        data: `"digits"`, `"mnist"` or `"fashion-mnist"`, drawn in `domain`; or photographs: a source of
            `wmateacher.integrations.vision.images`.
        backbone: A spec of `backbones.build`.
        image_size: Of drawings, and of images in evaluation, in pixels.
        crops: How they are cut.
        settings: How DINO is optimised.
        domain: In which grey images are drawn.
        redraw: Steps between which the share of crops that are drawn anew, in colours and at an angle of
            their own, goes from 0 to 1.
        train_images: At most that many training images are used.
        bank_images: At most that many images of each part are drawn for evaluation.
    """

    data: str
    backbone: str
    image_size: int
    crops: Crops
    settings: Settings
    domain: Domain = digits.WIDE
    redraw: tuple[int, int] = (0, 0)
    train_images: int = 10**9
    bank_images: int = 10**9


# An untrained network hardly sees shapes for colours. Its answers to two crops must agree by more than
# tau_T / tau_S, or what they agree on fades: so the first crops share their drawing, and tau_T is low.
_DRAWN = Recipe(
    data="digits",
    backbone="test_efficientnet_gn(output_stride=8)",
    image_size=16,
    crops=Crops(16, 8, 2, (0.7, 1.0), (0.4, 0.7)),
    settings=Settings(
        steps=1400,
        batch_size=128,
        warmup=140,
        hold_last=20,
        base_learning_rate=0.004,
        outputs=128,
        hidden=256,
        bottleneck=64,
        first_teacher_temperature=0.02,
        teacher_temperature=0.02,
        centering="sinkhorn",
    ),
    redraw=(60, 660),
    bank_images=10000,
)


def drawn(data: str = "digits", steps: int | None = None) -> Recipe:
    """Digits or clothes drawn in random colours, turned and noisy; small enough for a CPU.

    Args:
        data: `"digits"`, `"mnist"` or `"fashion-mnist"`.
        steps: Of the run; warm-up and the share of redrawn crops stretch with it.
    """
    recipe = replace(_DRAWN, data=data)
    if steps is None:
        return recipe
    scale = steps / recipe.settings.steps
    first, last = recipe.redraw
    settings = replace(recipe.settings, steps=steps, warmup=round(recipe.settings.warmup * scale))
    return replace(recipe, settings=settings, redraw=(round(first * scale), round(last * scale)))


def photographs(
    data: str,
    count: int,
    backbone: str | None = None,
    epochs: int = 100,
    batch_size: int | None = None,
) -> Recipe:
    """The recipe of Caron et al. 2021; for CIFAR-10 with smaller images, crops and network.

    Args:
        data: `"cifar10"` or `"imagefolder:DIR"`.
        count: Number of training images.
        backbone: A spec of `backbones.build`; a ViT-S/16, or a small ViT for CIFAR-10.
        epochs: Passes over the images; those of warm-up, held layer and temperature are 10, 1 and 30 of
            100 and shrink with them.
        batch_size: 1024, the paper's; 256 for CIFAR-10.
    """
    small = data == "cifar10"
    batch_size = min(batch_size or (256 if small else 1024), count)
    epoch = count // batch_size

    def steps(of_hundred: int) -> int:
        return round(of_hundred * epochs / 100 * epoch)

    settings = Settings(
        steps=epochs * epoch,
        batch_size=batch_size,
        warmup=steps(10),
        hold_last=epoch,
        temperature_warmup=steps(30),
        outputs=4096 if small else 65536,
    )
    if small:
        backbone = backbone or "vit_tiny_patch16_224(patch_size=4,drop_path_rate=0.1)"
        return Recipe(data, backbone, 32, Crops(32, 16, 6), settings)
    backbone = backbone or "vit_small_patch16_224(drop_path_rate=0.1)"
    return Recipe(data, backbone, 224, Crops(), settings)
