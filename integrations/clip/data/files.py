"""Image-text pairs from files: folders of classes, tables of captions, and tar shards."""

from __future__ import annotations

import csv
import tarfile
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from wmateacher.integrations.clip.data import imagenet

IMAGE_COLUMNS, CAPTION_COLUMNS, LABEL_COLUMN = ("filepath", "image"), ("title", "caption"), "label"
"""Of a table; open_clip's names first."""
_IMAGES, _TEXT, _LABEL = ("jpg", "jpeg", "png", "webp"), "txt", "cls"


class Captioned(Protocol):
    """Images with a text each.

    Attributes:
        labels: int64 `[N]`, their classes; None where there are none.
        templated: Their texts are made of their classes' names, in a template.
    """

    labels: Tensor | None
    templated: bool

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Image.Image, str]:
        """The image in RGB, and its text, empty where it is `templated`.

        Raises:
            OSError: It cannot be read.
        """
        ...

    def name(self, index: int) -> str:
        """Where it lies, for messages."""
        ...


class Folder:
    """A set of `clip.data.imagenet`, whose texts are templates with the classes' names."""

    templated = True

    def __init__(self, name: str, root: Path):
        self.photos = imagenet.load(name, root).images
        self.labels: Tensor | None = self.photos.labels

    def __len__(self) -> int:
        return len(self.photos)

    def read(self, index: int) -> tuple[Image.Image, str]:  # noqa: D102
        return self.photos[index][0], ""

    def name(self, index: int) -> str:  # noqa: D102
        return self.photos.files[index]


class Table:
    """A CSV or TSV of image files and captions, with a `label` column or without.

    Columns are found by their names, `IMAGE_COLUMNS` and `CAPTION_COLUMNS`; files are relative to the
    table's folder.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It has not the columns, or a row is not whole; it says which.
    """

    templated = False

    def __init__(self, file: Path):
        if not file.is_file():
            raise FileNotFoundError(f"no table of captions {file}: give an existing .csv or .tsv")
        self.file = file
        self.files: list[str] = []
        self.captions: list[str] = []
        try:
            self.labels = self._fill()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not text in UTF-8 ({error}): get it again") from error
        if not self.files:
            raise ValueError(f"{file} has no rows: give at least one image with a caption")

    def _fill(self) -> Tensor | None:
        labels: list[int] = []
        with self.file.open(newline="", encoding="utf-8-sig") as stream:
            header = stream.readline()
            stream.seek(0)
            rows = csv.reader(stream, delimiter="\t" if "\t" in header else ",", strict=True)
            names = next(rows, [])
            image, caption = self._column(names, IMAGE_COLUMNS), self._column(names, CAPTION_COLUMNS)
            label = names.index(LABEL_COLUMN) if LABEL_COLUMN in names else None
            for row in self._whole(rows, len(names)):
                self.files.append(row[image])
                self.captions.append(row[caption])
                if label is not None:
                    labels.append(_label(row[label], f"{self.file}, line {rows.line_num}"))
        return None if label is None else torch.tensor(labels)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[Image.Image, str]:  # noqa: D102
        return imagenet.opened(self.name(index)), self.captions[index]

    def name(self, index: int) -> str:  # noqa: D102
        return str(self.file.parent / self.files[index])

    def _column(self, names: Sequence[str], known: tuple[str, ...]) -> int:
        for name in known:
            if name in names:
                return names.index(name)
        raise ValueError(
            f"{self.file} has no column {' or '.join(map(repr, known))}, got {', '.join(map(repr, names))}: "
            "name the columns in the first line"
        )

    def _whole(self, rows: Any, columns: int) -> Iterator[list[str]]:
        try:
            for row in rows:
                if not row:  # a blank line
                    continue
                if len(row) != columns:
                    raise ValueError(
                        f"{self.file}, line {rows.line_num}: {len(row)} columns where the first line has "
                        f"{columns}; it is cut off there or damaged: get it again, or mend the line"
                    )
                yield row
        except csv.Error as error:
            raise ValueError(
                f"{self.file}, line {rows.line_num}: {error}: it is cut off there, or a quotation mark is "
                "not closed; get it again, or mend it"
            ) from error


class Shards:
    """Tar files in WebDataset's layout: for each key an image, a `.txt`, and a class in `.cls` or none.

    The archives are listed once, and read at any place from then on, so that their order is like any
    other's, and resumes.

    Args:
        pattern: Files with braces as WebDataset has them, such as `cc3m-{0000..0331}.tar`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: An archive cannot be read or is cut off, or has no pairs.
    """

    templated = False

    def __init__(self, pattern: str):
        try:
            from webdataset.shardlists import expand_urls
        except ImportError as error:
            raise ImportError("tar shards need WebDataset: pip install 'wmateacher[data]'") from error
        self.pairs: list[tuple[str, str, tuple[int, int], tuple[int, int]]] = []
        labels: list[int] = []
        for file in expand_urls(pattern):
            for key, parts in _listed(Path(file)).items():
                image = next((parts[e] for e in _IMAGES if e in parts), None)
                if image is None or _TEXT not in parts:
                    continue
                self.pairs.append((file, key, image, parts[_TEXT]))
                if _LABEL in parts:
                    text = _content(file, parts[_LABEL]).decode("utf-8", "replace")
                    labels.append(_label(text, f"{key}.{_LABEL} in {file}"))
        if not self.pairs:
            raise ValueError(
                f"no pairs in {pattern}: each needs an image ({', '.join(_IMAGES)}) and a .{_TEXT} of the "
                "same name"
            )
        if labels and len(labels) != len(self.pairs):
            raise ValueError(
                f"{len(labels)} of {len(self.pairs)} pairs in {pattern} have a .{_LABEL}: give all one, or "
                "none"
            )
        self.labels = torch.tensor(labels) if labels else None

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, index: int) -> tuple[Image.Image, str]:  # noqa: D102
        file, _, image, text = self.pairs[index]
        try:
            caption = _content(file, text).decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise OSError(f"the text of {self.name(index)} is not in UTF-8 ({error})") from error
        return imagenet.opened(BytesIO(_content(file, image))), caption

    def name(self, index: int) -> str:  # noqa: D102
        file, key, *_ = self.pairs[index]
        return f"{key} in {file}"


def _label(text: str, where: str) -> int:
    if text.strip().lstrip("+-").isdecimal() and abs(int(text)) < 2**31:
        return int(text)
    raise ValueError(f"{where}: label must be a whole number, got {text!r}")


def _listed(file: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Key -> extension -> (offset, size) of an archive's members."""
    from webdataset.tariterators import base_plus_ext

    if not file.is_file():
        raise FileNotFoundError(f"no shard {file}: give existing .tar files, {{000..009}} for many")
    found: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                key, extension = base_plus_ext(member.name)
                if not member.isfile() or key is None:
                    continue
                if member.offset_data + member.size > file.stat().st_size:
                    raise tarfile.ReadError(f"it ends inside {member.name}")
                found.setdefault(key, {})[extension.lower()] = (member.offset_data, member.size)
        with file.open("rb") as stream:
            stream.seek(-min(512, file.stat().st_size), 2)
            if any(stream.read()):
                raise tarfile.ReadError("it has no end mark, so it is cut off")
    except tarfile.TarError as error:
        raise ValueError(
            f"{file} cannot be read as an uncompressed tar ({error}): get it again, or unpack its compression"
        ) from error
    return found


def _content(file: str, part: tuple[int, int]) -> bytes:
    with open(file, "rb") as stream:
        stream.seek(part[0])
        return stream.read(part[1])


def load(where: str, root: Path | None) -> Captioned:
    """Pairs by the name of a set of ImageNet's kind, a table, or shards.

    Args:
        where: A name of `imagenet.SETS` that has all 1,000 classes; a file that ends in `.csv` or `.tsv`; or
            a pattern of `.tar` files.
        root: The folder that a set lies in, and that other paths are relative to.

    Raises:
        ValueError: It is none of these; or as the kinds say.
        FileNotFoundError: It is not there.
    """
    if where in imagenet.SETS:
        if imagenet.SETS[where].classes != len(imagenet.CLASSES):
            whole = [name for name, s in imagenet.SETS.items() if s.classes == len(imagenet.CLASSES)]
            raise ValueError(
                f"{where!r} has {imagenet.SETS[where].classes} classes, numbered in its own way, and is for "
                f"tests: train on {', '.join(whole)}, or on a table of captions"
            )
        if root is None:
            raise ValueError(f"{where!r} needs the folder that holds it: pass root=DIR (--data-root DIR)")
        return Folder(where, root)
    path = str(where if root is None else root / where)
    if path.lower().endswith((".csv", ".tsv")):
        return Table(Path(path))
    if ".tar" in path.lower():
        return Shards(path)
    raise ValueError(
        f"cannot tell what pairs {where!r} are: give a .csv, a .tsv, .tar shards, or one of "
        f"{', '.join(imagenet.SETS)}"
    )


def check_labels(data: Captioned, classes: int) -> None:
    """See that labels, where there are any, number the classes.

    Raises:
        ValueError: One does not; it says which.
    """
    if data.labels is None:
        return
    wrong = ((data.labels < 0) | (data.labels >= classes)).nonzero()[:, 0].tolist()
    if wrong:
        raise ValueError(
            f"labels must be in 0 ... {classes - 1}, got {int(data.labels[wrong[0]])} of "
            f"{data.name(wrong[0])}, and {len(wrong) - 1} more that are not: they number ImageNet's classes"
        )
