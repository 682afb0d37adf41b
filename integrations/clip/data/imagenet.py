"""ImageNet and its five shifted test sets, read from the folders that their authors distribute."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from wmateacher.checks import lookup, nearest

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "CLASSES",
    "SETS",
    "SHIFTS",
    "ImageSet",
    "Photos",
    "Test",
    "class_names",
    "find",
    "head_names",
    "load",
    "openai_templates",
    "read_image",
    "tracer_templates",
]

CLASSES = 1000
_BORDER = 2
# In OpenAI's list 657 and 744 are both "missile", 836 and 837 both "sunglasses".
_RENAMED = {
    201: "Silky Terrier", 227: "Kelpie", 638: "maillot", 639: "tank suit", 692: "product packet",
    744: "projectile", 837: "dark glasses", 911: "woolen",
}  # fmt: skip
_HARD_TO_SEE = ("small", "vague", "distant", "partially visible", "hidden", "faint")


@lru_cache
def class_names() -> tuple[str, ...]:
    """Return OpenAI's names of the 1,000 classes, which fill the captions in training. Two occur twice."""
    import open_clip

    return tuple(open_clip.IMAGENET_CLASSNAMES)


@lru_cache
def head_names() -> tuple[str, ...]:
    """Return the 1,000 distinct names that the published zero-shot heads are made of.

    Eight differ from `class_names`, so that no two classes have the same column.
    """
    return tuple(_RENAMED.get(i, name) for i, name in enumerate(class_names()))


@lru_cache
def openai_templates() -> tuple[str, ...]:
    """Return OpenAI's 80 captions."""
    import open_clip

    return tuple(t("{}") for t in open_clip.OPENAI_IMAGENET_TEMPLATES)


def tracer_templates() -> tuple[str, ...]:
    """Return TRACER's 86 captions: OpenAI's 80 and six on what is hard to see."""
    return (*openai_templates(), *(f"a photo containing a {how} {{}}." for how in _HARD_TO_SEE))


@dataclass(frozen=True)
class ImageSet:
    """One data set, as its authors distribute it.

    Attributes:
        name: The name in results and messages.
        folders: Folders under the data root that may hold the set; the first that exists is read.
        layout: The meaning of the folders in it. `"wnid"`: one for each WordNet identifier; `"numbers"`: one
            for each class index from 0; `"objectnet"`: one for each object under `images`, beside
            `mappings`.
        classes: The number of classes C that it is scored on.
        images: The number of images of these classes in the published set.
        source: The address or archive that the data set is distributed in.
        subset: timm's list of its classes if it does not have all 1,000.
    """

    name: str
    folders: tuple[str, ...]
    layout: Literal["wnid", "numbers", "objectnet"]
    classes: int
    images: int
    source: str
    subset: str | None = None


SETS: Mapping[str, ImageSet] = {
    s.name: s
    for s in (
        ImageSet(
            "imagenet-train", ("imagenet/train", "ILSVRC2012/train", "train"), "wnid", 1000, 1_281_167,
            "ILSVRC2012_img_train.tar from https://image-net.org, one folder per class",
        ),
        ImageSet(
            "imagenet", ("imagenet/val", "ILSVRC2012/val", "val"), "wnid", 1000, 50_000,
            "ILSVRC2012_img_val.tar from https://image-net.org, sorted into one folder per class",
        ),
        ImageSet(
            "imagenet-v2", ("imagenetv2-matched-frequency-format-val", "imagenetv2"), "numbers", 1000, 10_000,
            "imagenetv2-matched-frequency of https://github.com/modestyachts/ImageNetV2",
        ),
        ImageSet(
            "imagenet-r", ("imagenet-r",), "wnid", 200, 30_000,
            "imagenet-r.tar of https://github.com/hendrycks/imagenet-r", "imagenet_r_synsets.txt",
        ),
        ImageSet(
            "imagenet-a", ("imagenet-a",), "wnid", 200, 7_500,
            "imagenet-a.tar of https://github.com/hendrycks/natural-adv-examples", "imagenet_a_synsets.txt",
        ),
        ImageSet(
            "imagenet-sketch", ("imagenet-sketch", "sketch", "ImageNet-Sketch"), "wnid", 1000, 50_889,
            "https://github.com/HaohanWang/ImageNet-Sketch",
        ),
        ImageSet(
            "objectnet", ("objectnet-1.0", "objectnet"), "objectnet", 113, 18_574,
            "objectnet-1.0.zip from https://objectnet.dev",
        ),
    )
}  # fmt: skip
"""The data sets by name. `imagenet` is ImageNet's validation set, on which the paper tests."""
SHIFTS = ("imagenet-v2", "imagenet-r", "imagenet-a", "imagenet-sketch", "objectnet")
"""The paper's shifted test sets."""


def read_image(file: str | BytesIO, border: int = 0) -> Image.Image:
    """Read an image in RGB and cut off `border` pixels on every side.

    Raises:
        OSError: If the image cannot be read, whichever error its decoder raised, or is nothing but border.
    """
    from PIL import Image

    try:
        with Image.open(file) as image:
            whole = image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # decoders raise many kinds, decompression bombs among them
        raise OSError(f"{file} cannot be read as an image ({error})") from error
    if not border:
        return whole
    width, height = whole.size
    if min(width, height) <= 2 * border:
        raise OSError(f"{file} has {width} x {height} pixels, nothing but its border")
    return whole.crop((border, border, width - border, height - border))


class Photos(Dataset[Any]):
    """Image files with labels.

    Args:
        files: The paths.
        labels: Class indices, int64 `[N]`.
        border: Pixels to cut off on every side.
    """

    def __init__(self, files: Sequence[str], labels: Tensor, border: int = 0):
        self.files, self.labels, self.border = list(files), labels, border

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Return an image in RGB and its label.

        Raises:
            OSError: If the file cannot be read as an image.
        """
        return read_image(self.files[index], self.border), int(self.labels[index])

    def name(self, index: int) -> str:
        """Return the path of an image."""
        return self.files[index]


@dataclass(frozen=True)
class Test:
    """A test set.

    Attributes:
        images: The images, with labels 0 ... C - 1 within the set.
        classes: The number of classes C.
        logits_of: A function from logits of ImageNet's classes `[B, 1000]` to logits of the set's, `[B, C]`.
    """

    images: Photos
    classes: int
    logits_of: Callable[[Tensor], Tensor]


def find(name: str, root: Path) -> Path:
    """Return the folder of a set under a data root.

    Raises:
        ValueError: If there is no set of that name.
        FileNotFoundError: If the set is missing; the message says where to get it.
    """
    wanted = lookup("data set", name, SETS)
    for folder in wanted.folders:
        if (root / folder).is_dir():
            return root / folder
    raise FileNotFoundError(
        f"no {name} in {root}: expected it in {' or '.join(wanted.folders)}; get {wanted.source}"
    )


def load(name: str, root: Path, *, crop_border: bool = False) -> Test:
    """Read a test set, which may have a part of its classes only.

    ImageNet-R and -A are scored among their 200 classes. ObjectNet is scored among its 113 classes; the
    logit of each is the largest among the ImageNet classes that it is mapped to.

    Args:
        name: A name of `SETS`.
        root: The folder that holds the sets.
        crop_border: Whether to cut off the red border of ObjectNet's images, 2 pixels, as its authors ask.
            The published figures, like those of WiSE-FT's code, are of images with their border.

    Raises:
        ValueError: If there is no set of that name, a folder in it is not one of its classes, or it has no
            images.
        FileNotFoundError: If the set is missing; the message says where to get it.
    """
    folder = find(name, root)
    wanted = SETS[name]
    if wanted.layout == "objectnet":
        return _objectnet(folder, _BORDER if crop_border else 0)
    if wanted.layout == "numbers":
        return Test(_labelled(folder, {str(i): i for i in range(CLASSES)}, name), CLASSES, _all)
    if wanted.subset is None:
        return Test(_labelled(folder, _index(), name), CLASSES, _all)
    indices = sorted(_index()[wnid] for wnid in _lines(wanted.subset))
    inside = {wnid: indices.index(_index()[wnid]) for wnid in _lines(wanted.subset)}
    return Test(_labelled(folder, inside, name), len(indices), _Subset(tuple(indices)))


def _all(logits: Tensor) -> Tensor:
    return logits


@dataclass(frozen=True)
class _Subset:
    """Select the logits of some classes."""

    indices: tuple[int, ...]

    def __call__(self, logits: Tensor) -> Tensor:
        return logits[:, list(self.indices)]


@dataclass(frozen=True)
class _Largest:
    """Take the largest logit of the ImageNet classes that each class of a set is mapped to."""

    groups: tuple[tuple[int, ...], ...]

    def __call__(self, logits: Tensor) -> Tensor:
        return torch.stack([logits[:, list(group)].amax(1) for group in self.groups], dim=1)


@lru_cache
def _index() -> dict[str, int]:
    """Return the class index of every WordNet identifier."""
    from timm.data import ImageNetInfo

    return {wnid: i for i, wnid in enumerate(ImageNetInfo().label_names())}


@lru_cache
def _lines(file: str) -> tuple[str, ...]:
    """Read one of timm's lists of a set's classes."""
    text = (resources.files("timm.data") / "_info" / file).read_text(encoding="utf-8")
    return tuple(text.split())


def _labelled(
    folder: Path, label: Mapping[str, int], name: str, border: int = 0, others: Sequence[str] = ()
) -> Photos:
    """Return the images in the folders named in `label`, leaving out those in `others`.

    Raises:
        ValueError: If a folder is in neither, or there are no images.
    """
    from torchvision.datasets import ImageFolder

    try:
        found = ImageFolder(str(folder), allow_empty=True)
    except FileNotFoundError as error:
        raise ValueError(f"{folder} has no folders of images: {name} has one for each class") from error
    wrong = [c for c in found.classes if c not in label and c not in others]
    if wrong:
        raise ValueError(
            f"folder {folder / wrong[0]} is not a class of {name}"
            + (f", nor are {len(wrong) - 1} others" if wrong[1:] else "")
            + f": {nearest(wrong[0], label)}. Move it out of there"
        )
    kept = [(file, label[found.classes[i]]) for file, i in found.samples if found.classes[i] in label]
    if not kept:
        raise ValueError(f"{folder} has no images of {name}'s classes")
    return Photos([file for file, _ in kept], torch.tensor([i for _, i in kept]), border)


def _objectnet(folder: Path, border: int) -> Test:
    """Return the ObjectNet classes that its mappings relate to ImageNet."""
    mappings = folder / "mappings"
    named = _json(mappings / "folder_to_objectnet_label.json")
    related = _json(mappings / "objectnet_to_imagenet_1k.json")
    line_of = _json(mappings / "pytorch_to_imagenet_2012_id.json")
    try:
        lines = (mappings / "imagenet_to_label_2012_v2").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise _incomplete(mappings / "imagenet_to_label_2012_v2") from error
    folder_of = {label: name for name, label in named.items()}
    try:
        index = {lines[line].strip(): int(i) for i, line in line_of.items()}
        groups = {
            folder_of[label]: tuple(index[part.strip()] for part in parts.split(";"))
            for label, parts in related.items()
        }
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"the mappings in {mappings} do not match each other ({error!r}): take all from one archive"
        ) from error
    ordered = sorted(groups)
    label = {name: i for i, name in enumerate(ordered)}
    images = _labelled(folder / "images", label, "objectnet", border, tuple(named))
    return Test(images, len(ordered), _Largest(tuple(groups[name] for name in ordered)))


def _json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise _incomplete(file) from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is not the JSON of objectnet-1.0.zip ({error})") from error


def _incomplete(file: Path) -> FileNotFoundError:
    return FileNotFoundError(f"no {file}: unpack all of {SETS['objectnet'].source}")
