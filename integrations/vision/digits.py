"""Small real data with domain shifts: digits in colours, rotated, noisy, on other backgrounds.

Sources are grey images whose values are amounts of ink: scikit-learn's bundled handwritten digits, MNIST
or Fashion-MNIST. A `Domain` draws them in colour; the shift suite (`SHIFTS`) mirrors pre-training on many
domains, fine-tuning on one, and evaluation under shift.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from wmateacher.checks import one_of
from wmateacher.integrations.engine.sampling import hold_out

__all__ = [
    "BLACK",
    "BLUE",
    "NARROW",
    "RED",
    "SHIFTS",
    "SOURCES",
    "WHITE",
    "WIDE",
    "Colour",
    "Domain",
    "Range",
    "Source",
    "Split",
    "load",
    "stratify",
]

Colour = tuple[float, float, float]
Range = tuple[float, float]

BLACK: Colour = (0.0, 0.0, 0.0)
WHITE: Colour = (1.0, 1.0, 1.0)
RED: Colour = (0.9, 0.1, 0.1)
BLUE: Colour = (0.1, 0.1, 0.9)

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FASHION = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
DIGIT_TEMPLATES = (
    "a photo of the digit {}",
    "the number {}",
    "a handwritten {}",
    "a drawing of the number {}",
    "the digit {} in colour",
)
FASHION_TEMPLATES = (
    "a photo of a {}",
    "a picture of a {}",
    "a drawing of a {}",
    "a small photo of the {}",
    "a {} in colour",
)


@dataclass(frozen=True)
class Split:
    """Grey images and their labels.

    Attributes:
        images: float32 `[N, 1, H, W]`, ink in [0, 1].
        labels: int64 `[N]`.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, count: int, seed: int = 0) -> Split:
        """Return `count` images chosen at random, or all if there are not more."""
        if count >= len(self):
            return self
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        return Split(self.images[chosen], self.labels[chosen])


@dataclass(frozen=True)
class Source:
    """A data set in three splits.

    Attributes:
        name: The name, as given to `load`.
        classes: The class names, in the order of the labels.
        templates: Captions with one `{}` for the class name.
        train: The images for pre-training and fine-tuning.
        val: The images for all choices that depend on results.
        test: The images for reported results.
    """

    name: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    train: Split
    val: Split
    test: Split


@dataclass(frozen=True)
class Domain:
    """The colours, rotation and noise with which grey images are drawn.

    Attributes:
        ink: Colours of the ink for labels 0-4 and for 5-9, or `"random"` for a random one for each image.
        paper: Colours of the background, in the same form. A random colour keeps a contrast of 0.35 to the
            ink.
        agreement: Share of images whose colours follow their label; the others get those of the other half.
        rotation: Range of the angle in degrees, counter-clockwise.
        noise: Range of the standard deviation of Gaussian noise, clipped to [0, 1] afterwards.
    """

    ink: tuple[Colour, Colour] | Literal["random"]
    paper: tuple[Colour, Colour] | Literal["random"]
    agreement: float = 1.0
    rotation: Range = (0.0, 0.0)
    noise: Range = (0.0, 0.0)

    def draw(self, split: Split, size: int, generator: torch.Generator) -> Tensor:
        """Draw every image of a split once.

        Args:
            split: Grey images `[B, 1, H, W]` and labels `[B]`.
            size: Height and width S of the result, in pixels.
            generator: The generator of all random numbers.

        Returns:
            The drawings, float32 `[B, 3, S, S]` in [0, 1].
        """
        count = len(split)

        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(count, generator=generator)

        grey = split.images
        if grey.shape[-1] != size or grey.shape[-2] != size:
            grey = F.interpolate(grey, (size, size), mode="bilinear", antialias=True)
        if self.rotation != (0.0, 0.0):
            grey = _rotate(grey, uniform(*self.rotation))
        half = (split.labels >= 5) ^ (torch.rand(count, generator=generator) >= self.agreement)
        ink, paper = self._colours(half.long(), generator)
        image = paper[:, :, None, None] * (1 - grey) + ink[:, :, None, None] * grey
        if self.noise != (0.0, 0.0):
            sigma = uniform(*self.noise)[:, None, None, None]
            image = image + sigma * torch.randn(image.shape, generator=generator)
        return image.clamp(0, 1)

    def _colours(self, half: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the colours of ink and paper, `[B, 3]` each."""

        def pick(colours: tuple[Colour, Colour] | Literal["random"]) -> Tensor:
            if colours == "random":
                return torch.rand(len(half), 3, generator=generator)
            return torch.tensor(colours)[half]

        ink, paper = pick(self.ink), pick(self.paper)
        if "random" in (self.ink, self.paper):
            # Similar colours would hide the digit: push them apart, by changing the paper if it is random.
            close = (ink - paper).abs().amax(1, keepdim=True) < 0.35
            apart = torch.where(ink > 0.5, ink - 0.5, ink + 0.5)
            if self.paper == "random":
                paper = torch.where(close, apart, paper)
            else:
                ink = torch.where(close, torch.where(paper > 0.5, paper - 0.5, paper + 0.5), ink)
        return ink, paper


def _rotate(images: Tensor, degrees: Tensor) -> Tensor:
    angle = torch.deg2rad(degrees)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    inverse = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
    grid = F.affine_grid(inverse, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


NARROW = Domain(ink=(RED, BLUE), paper=(BLACK, BLACK), agreement=0.95)
"""The fine-tuning domain: 0-4 red and 5-9 blue with probability 95%, on black."""

WIDE = Domain(ink="random", paper="random", rotation=(-45.0, 45.0), noise=(0.0, 0.2))
"""The pre-training domains: any two colours, any small rotation, some noise."""

SHIFTS: Mapping[str, Domain] = {
    "gray": replace(NARROW, ink=(WHITE, WHITE)),
    "inverted": replace(NARROW, ink=(BLACK, BLACK), paper=(WHITE, WHITE)),
    "rotated": replace(NARROW, rotation=(30.0, 30.0)),
    "noisy": replace(NARROW, noise=(0.3, 0.3)),
    "swapped": replace(NARROW, ink=(BLUE, RED)),
    "background": replace(NARROW, paper="random"),
}
"""The six test domains, which fine-tuning does not see."""

SOURCES = ("digits", "mnist", "fashion-mnist")


def load(name: str = "digits", root: str | Path | None = None, *, download: bool = False) -> Source:
    """Load a source of grey images in three fixed, stratified splits.

    Args:
        name: `"digits"` (1,797 images of 8x8 bundled with scikit-learn: 1,097 / 300 / 400),
            `"mnist"` or `"fashion-mnist"` (through torchvision: 58,000 / 2,000 of its training images
            and its 10,000 test images).
        root: The folder that holds torchvision's `MNIST/raw`, required for all but `"digits"`.
        download: Whether torchvision may download missing files.

    Raises:
        ValueError: If the name is unknown, or `root` is missing.
        FileNotFoundError: If the files are missing.
    """
    if name == "digits":
        everything = _bundled()
        rest, test = stratify(everything, 400)
        train, val = stratify(rest, 300)
        return Source(name, DIGITS, DIGIT_TEMPLATES, train, val, test)
    one_of("data", name, SOURCES)
    if root is None:
        raise ValueError(
            f"data {name!r} needs the folder that holds it, got root=None: pass root=DIR "
            "(--data-root DIR), and download=True (--download) to fetch it there"
        )
    train, val = stratify(_torchvision(name, Path(root), True, download), 2000)
    test = _torchvision(name, Path(root), False, download)
    if name == "mnist":
        return Source(name, DIGITS, DIGIT_TEMPLATES, train, val, test)
    return Source(name, FASHION, FASHION_TEMPLATES, train, val, test)


def _bundled() -> Split:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the bundled digits need scikit-learn: pip install 'wmateacher[examples]'"
        ) from error
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 16
    return Split(images, torch.from_numpy(digits.target).long())


def _torchvision(name: str, root: Path, train: bool, download: bool) -> Split:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ImportError(f"{name} needs torchvision: pip install 'wmateacher[examples]'") from error
    kind = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST}[name]
    folder = root / kind.__name__ / "raw"
    if not download and not folder.is_dir():
        raise FileNotFoundError(
            f"no {name} in {folder}: give the folder above {kind.__name__!r} as root (--data-root), or "
            "pass download=True (--download)"
        )
    try:
        data = kind(str(root), train=train, download=download)
    except (RuntimeError, ValueError, AssertionError, IndexError, EOFError, TypeError) as error:
        raise ValueError(
            f"{name} in {folder} cannot be read ({error}): delete it and pass download=True (--download), "
            "or unpack it there again"
        ) from error
    return Split(data.data[:, None].float() / 255, data.targets.long())


def stratify(split: Split, held_out: int) -> tuple[Split, Split]:
    """Split off `held_out` images, with the classes in the same proportions in both parts."""
    out = hold_out(split.labels, held_out)
    return Split(split.images[~out], split.labels[~out]), Split(split.images[out], split.labels[out])
