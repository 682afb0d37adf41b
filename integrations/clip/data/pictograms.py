"""Pictograms drawn by several hands, with their names, as batches of image-text pairs.

The folder holds `PART/STYLE/CLASS/CODE.png` for the parts `train`, `validation` and `test`, the same
pictograms in every style, and `pictograms.tsv` with the columns part, class, code, name and keywords
(separated by `|`). `data.emoji` builds it from published emoji packages.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from wmateacher.integrations.clip.data.batches import Batch, own_parts
from wmateacher.integrations.clip.model import Tokenizer
from wmateacher.integrations.engine.sampling import Epochs, generator

__all__ = [
    "COLUMNS",
    "HOW_TO_BUILD",
    "PARTS",
    "PREPROCESSING",
    "TABLE",
    "TEMPLATES",
    "Part",
    "PictogramPairs",
    "Pictograms",
    "load",
    "prepare",
]

PARTS = ("train", "validation", "test")
TABLE = "pictograms.tsv"
COLUMNS = ("part", "class", "code", "name", "keywords")
TEMPLATES = ("{}", "a picture of {}", "a drawing of {}", "an emoji of {}", "a small icon of {}")
HOW_TO_BUILD = (
    "`python -m wmateacher.integrations.clip.data.emoji --help` says how to build it from published packages"
)
_MOST_TEXTS = 3
# White paper becomes 0, like what convolutions see beyond the border.
_WHITE, _STD = 1.0, 0.3
PREPROCESSING: Mapping[str, Any] = {"mean": (_WHITE,) * 3, "std": (_STD,) * 3}
"""The normalisation of `prepare`, in the terms of `open_clip.get_model_preprocess_cfg`."""


@dataclass(frozen=True)
class Part:
    """The pictograms of one part, in every style.

    Attributes:
        images: For each style, uint8 `[N, 3, H, W]`.
        labels: The class of each pictogram, int64 `[N]`.
        texts: The name, the kind and the keywords of each pictogram.
    """

    images: Mapping[str, Tensor]
    labels: Tensor
    texts: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Pictograms:
    """A folder of pictograms.

    Attributes:
        classes: The class names, in the order of the labels; `animal bird` for the folder `animal-bird`.
        parts: The three parts by name.
    """

    classes: tuple[str, ...]
    parts: Mapping[str, Part]


def load(root: Path, styles: Sequence[str]) -> Pictograms:
    """Read all pictograms of some styles.

    Args:
        root: The folder.
        styles: The names of the styles.

    Raises:
        FileNotFoundError: If the table, a style or an image is missing.
        ValueError: If the table is damaged, a part is empty, or images differ in size.
    """
    rows = _rows(root / TABLE)
    folders = sorted({row["class"] for row in rows if row["part"] == "train"})
    for row in rows:
        if row["class"] not in folders:
            raise ValueError(
                f"{root / TABLE}: class {row['class']!r} of {row['code']} ({row['part']}) has no training "
                "pictogram: remove the class, or move some of its pictograms to part 'train'"
            )
    for style in styles:
        if not (root / PARTS[0] / style).is_dir():
            there = sorted(p.name for p in (root / PARTS[0]).glob("*") if p.is_dir())
            raise FileNotFoundError(
                f"no style {style!r} in {root / PARTS[0]}, which has {', '.join(there) or 'none'}: choose "
                "styles that are there"
            )
    parts = {}
    for part in PARTS:
        own = [row for row in rows if row["part"] == part]
        if not own:
            raise ValueError(f"{root / TABLE} has no row of part {part!r}: give each part some pictograms")
        images = {s: _stack([root / part / s / r["class"] / f"{r['code']}.png" for r in own]) for s in styles}
        labels = torch.tensor([folders.index(r["class"]) for r in own])
        words = [(r["name"], _spaced(r["class"]), *r["keywords"].split("|")) for r in own]
        parts[part] = Part(images, labels, tuple(tuple(dict.fromkeys(filter(None, w))) for w in words))
    return Pictograms(tuple(map(_spaced, folders)), parts)


def _spaced(folder: str) -> str:
    """Return the name of a class in words."""
    return folder.replace("-", " ")


def _rows(table: Path) -> list[dict[str, str]]:
    if not table.is_file():
        raise FileNotFoundError(
            f"no table {table}: give the folder that holds it as root (--data-root); {HOW_TO_BUILD}"
        )
    with table.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{table} has no column {missing[0]!r}: it must have {', '.join(COLUMNS)}")
        rows = list(reader)
    for line, row in enumerate(rows, 2):
        if None in row.values() or None in row or row["part"] not in PARTS or not row["name"]:
            raise ValueError(
                f"{table}, line {line}: give part ({', '.join(PARTS)}), class, code, name and keywords, got "
                f"{[v for v in row.values() if v is not None]}"
            )
    return rows


def _stack(files: Sequence[Path]) -> Tensor:
    images = []
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"no picture {file}, which {TABLE} lists: get it again, or remove its row"
            )
        try:
            with Image.open(file) as image:
                images.append(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))
        except OSError as error:
            raise ValueError(f"{file} cannot be read ({error}): get it again") from error
        if images[-1].shape != images[0].shape:
            raise ValueError(
                f"{file} has {tuple(images[-1].shape[1:])} pixels and {files[0].name} has "
                f"{tuple(images[0].shape[1:])}: make all pictures equally large"
            )
    return torch.stack(images)


def prepare(images: Tensor, size: int) -> Tensor:
    """Return normalised images of the towers' size, with white as 0.

    Args:
        images: uint8 `[N, 3, H, W]`.
        size: The height and width of the result, in pixels.
    """
    pixels = images.float() / 255
    if pixels.shape[-2:] != (size, size):
        pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    return (pixels - _WHITE) / _STD


class PictogramPairs:
    """Pictograms with captions, each slightly moved, scaled and perhaps mirrored, anew at every step.

    This is a `loop.Stream`. The content of a step depends on the seed and the step alone, so a resumed run
    continues in its data. Each of several processes gets its part of every batch.

    Args:
        images: Normalised images, `[N, 3, S, S]`.
        labels: Their classes, int64 `[N]`.
        texts: The texts of each image. A caption has one to three of them, drawn anew at each step.
        templates: Captions with one `{}` for the texts.
        tokenizer: The towers' tokenizer.
        batch_size: Pairs per step.
        seed: The seed of order, changes of the images and captions.

    Raises:
        ValueError: If there are fewer images than a batch has.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        texts: Sequence[Sequence[str]],
        templates: Sequence[str],
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        seed: int,
    ):
        self.images, self.labels, self.texts = images, labels, texts
        self.templates, self.tokenizer, self.seed = templates, tokenizer, seed
        self.epochs = Epochs(len(images), batch_size, seed)
        self._tokens: dict[str, Tensor] = {}

    def __call__(self, first_step: int) -> Iterator[Batch]:
        """Return this process's batches without end, from `first_step` on."""
        return own_parts(self.batch, first_step)

    def batch(self, step: int) -> Batch:
        """Return the batch of one step, with the pairs of all processes."""
        indices = self.epochs(step)
        random = generator(self.seed, 1, step)
        images = _changed(self.images[indices], random)
        captions = [self._caption(self.texts[i], random) for i in indices.tolist()]
        distinct = list(dict.fromkeys(captions))
        row = {text: i for i, text in enumerate(distinct)}
        which = torch.tensor([row[text] for text in captions])
        return Batch(images, self._tokenized(distinct), which, self.labels[indices])

    def _tokenized(self, captions: Sequence[str]) -> Tensor:
        """Return the tokens of captions; each is tokenized once, which takes longer than its embedding."""
        new = [text for text in captions if text not in self._tokens]
        self._tokens |= zip(new, self.tokenizer(new), strict=True) if new else ()
        return torch.stack([self._tokens[text] for text in captions])

    def _caption(self, texts: Sequence[str], random: torch.Generator) -> str:
        count = int(torch.randint(min(_MOST_TEXTS, len(texts)), (), generator=random)) + 1
        chosen = torch.randperm(len(texts), generator=random)[:count].tolist()
        template = self.templates[int(torch.randint(len(self.templates), (), generator=random))]
        return template.format(", ".join(texts[i] for i in chosen))


def _changed(images: Tensor, random: torch.Generator) -> Tensor:
    """Mirror half of the images, scale them by 0.8 to 1.2 and move them by up to a tenth of their size."""
    count = len(images)
    scale = 0.8 + 0.4 * torch.rand(count, generator=random)
    mirror = 1 - 2 * torch.randint(2, (count,), generator=random).float()
    shift = 0.4 * torch.rand(count, 2, generator=random) - 0.2  # in halves of the size
    inverse = torch.zeros(count, 2, 3)
    inverse[:, 0, 0], inverse[:, 1, 1], inverse[:, :, 2] = mirror / scale, 1 / scale, shift
    grid = F.affine_grid(inverse, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
