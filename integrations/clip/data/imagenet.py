"""ImageNet and the five sets that it is shifted to, read from their own folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from wmateacher.checks import nearest

CLASSES: tuple[str, ...] = tuple(open_clip.IMAGENET_CLASSNAMES)
"""OpenAI's names of the 1,000 classes."""
TEMPLATES: tuple[str, ...] = tuple(t("{}") for t in open_clip.OPENAI_IMAGENET_TEMPLATES)
"""OpenAI's 80 captions; TRACER trains on six more of its own, which are not known to us."""
_BORDER = 2


@dataclass(frozen=True)
class ImageSet:
    """One data set, as its authors distribute it.

    Attributes:
        name: In results and messages.
        folders: Where under the data root it may lie; the first that exists is read.
        layout: `"wnid"`: a folder of images for each WordNet identifier; `"numbers"`: for each class index
            from 0; `"objectnet"`: for each object, under `images`, beside its `mappings`.
        classes: Number of classes C that it is scored on.
        images: Their number in the published set, on those classes.
        source: How to get it.
        subset: timm's list of its classes, where it does not have all 1,000.
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
            "ILSVRC2012_img_train.tar from https://image-net.org, one folder a class",
        ),
        ImageSet(
            "imagenet", ("imagenet/val", "ILSVRC2012/val", "val"), "wnid", 1000, 50_000,
            "ILSVRC2012_img_val.tar from https://image-net.org, sorted into one folder a class",
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
"""By name; `imagenet` is its validation set, on which the paper tests."""
SHIFTS = ("imagenet-v2", "imagenet-r", "imagenet-a", "imagenet-sketch", "objectnet")
"""The paper's."""


def opened(file: str | BytesIO, border: int = 0) -> Image.Image:
    """An image in RGB, without a border of so many pixels.

    Raises:
        OSError: It cannot be read, whichever way its decoder failed, or nothing of it is left.
    """
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
        files: The files.
        labels: int64 `[N]`.
        border: Pixels to cut off on every side.
    """

    def __init__(self, files: Sequence[str], labels: Tensor, border: int = 0):
        self.files, self.labels, self.border = list(files), labels, border

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """The image in RGB, and its label.

        Raises:
            OSError: The file cannot be read as an image.
        """
        return opened(self.files[index], self.border), int(self.labels[index])


@dataclass(frozen=True)
class Test:
    """A set to score on.

    Attributes:
        images: Labels are 0 ... C - 1 within the set.
        classes: C.
        answers: Logits `[B, 1000]` of ImageNet's classes to those of the set, `[B, C]`.
    """

    images: Photos
    classes: int
    answers: Callable[[Tensor], Tensor]


def find(name: str, root: Path) -> Path:
    """The folder of a set under a data root.

    Raises:
        ValueError: There is no set of that name.
        FileNotFoundError: It is not there; says how to get it.
    """
    if name not in SETS:
        raise ValueError(f"unknown data set {name!r}; {nearest(name, SETS)}")
    wanted = SETS[name]
    for folder in wanted.folders:
        if (root / folder).is_dir():
            return root / folder
    raise FileNotFoundError(
        f"no {name} in {root}: expected it in {' or '.join(wanted.folders)}; get {wanted.source}"
    )


def load(name: str, root: Path) -> Test:
    """Read a set; a part of its classes is enough.

    ImageNet-R and -A are scored among their 200 classes; ObjectNet among its 113, each with the largest of
    the logits of the ImageNet classes that it is mapped to.

    Raises:
        ValueError: There is no set of that name; a folder in it is none of its classes; it has no images.
        FileNotFoundError: It is not there; says how to get it.
    """
    folder = find(name, root)
    wanted = SETS[name]
    if wanted.layout == "objectnet":
        return _objectnet(folder)
    if wanted.layout == "numbers":
        return Test(_labelled(folder, {str(i): i for i in range(1000)}, name), 1000, _all)
    if wanted.subset is None:
        return Test(_labelled(folder, _index(), name), 1000, _all)
    chosen = sorted(_index()[wnid] for wnid in _lines(wanted.subset))
    inside = {wnid: chosen.index(_index()[wnid]) for wnid in _lines(wanted.subset)}
    return Test(_labelled(folder, inside, name), len(chosen), _Subset(tuple(chosen)))


def _all(logits: Tensor) -> Tensor:
    return logits


@dataclass(frozen=True)
class _Subset:
    """Logits of some classes."""

    chosen: tuple[int, ...]

    def __call__(self, logits: Tensor) -> Tensor:
        return logits[:, list(self.chosen)]


@dataclass(frozen=True)
class _Largest:
    """For each class of a set the largest logit of the ImageNet classes that it is mapped to."""

    groups: tuple[tuple[int, ...], ...]

    def __call__(self, logits: Tensor) -> Tensor:
        return torch.stack([logits[:, list(group)].amax(1) for group in self.groups], dim=1)


@lru_cache
def _index() -> dict[str, int]:
    """WordNet identifier -> index of the ImageNet class."""
    return {wnid: i for i, wnid in enumerate(ImageNetInfo().label_names())}


@lru_cache
def _lines(file: str) -> tuple[str, ...]:
    """A list that timm has of a set's classes."""
    text = (resources.files("timm.data") / "_info" / file).read_text(encoding="utf-8")
    return tuple(text.split())


def _labelled(
    folder: Path, label: Mapping[str, int], name: str, border: int = 0, others: Sequence[str] = ()
) -> Photos:
    """The images in the folders that `label` knows; `others` are known too, and left out.

    Raises:
        ValueError: A folder is neither; there are no images.
    """
    try:
        found = ImageFolder(str(folder), allow_empty=True)
    except FileNotFoundError as error:
        raise ValueError(f"{folder} has no folders of images: {name} has one for each class") from error
    wrong = [c for c in found.classes if c not in label and c not in others]
    if wrong:
        raise ValueError(
            f"folder {folder / wrong[0]} is no class of {name}"
            + (f", nor are {len(wrong) - 1} others" if wrong[1:] else "")
            + f": {nearest(wrong[0], label)}. Move it out of there"
        )
    kept = [(file, label[found.classes[i]]) for file, i in found.samples if found.classes[i] in label]
    if not kept:
        raise ValueError(f"{folder} has no images of {name}'s classes")
    return Photos([file for file, _ in kept], torch.tensor([i for _, i in kept]), border)


def _objectnet(folder: Path) -> Test:
    """The classes that ObjectNet's own mappings relate to ImageNet, its images without their red border."""
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
            f"the mappings in {mappings} do not fit each other ({error!r}): take all from one archive"
        ) from error
    ordered = sorted(groups)
    label = {name: i for i, name in enumerate(ordered)}
    images = _labelled(folder / "images", label, "objectnet", _BORDER, tuple(named))
    return Test(images, len(ordered), _Largest(tuple(groups[name] for name in ordered)))


def _json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise _incomplete(file) from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is not the JSON of objectnet-1.0.zip ({error})") from error


def _incomplete(file: Path) -> FileNotFoundError:
    return FileNotFoundError(f"no {file}: {SETS['objectnet'].source} has it; unpack all of it")
