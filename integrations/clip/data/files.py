"""Image-text pairs in files: folders of classes, tables of captions, and tar shards."""

from __future__ import annotations

import csv
import tarfile
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from wmateacher.integrations.clip.data import imagenet

__all__ = ["Captioned", "Folder", "Label", "Read", "Shards", "Table", "check_labels", "load", "whole_number"]

# The column names of a table; open_clip's come first.
_IMAGE_COLUMNS, _CAPTION_COLUMNS, _LABEL_COLUMN = ("filepath", "image"), ("title", "caption"), "label"
# The extensions of the members of a shard.
_IMAGES, _TEXT, _LABEL = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff"), "txt", "cls"


Read = Callable[[str | BytesIO], Image.Image]
"""A function that reads an image file, or its content, in RGB."""
Label = Callable[[str, str], int]
"""A function from a label as written, and where it stands, to a class index."""


def whole_number(text: str, where: str) -> int:
    """Return a label that is a class index.

    Raises:
        ValueError: If the text is not a whole number.
    """
    if text.strip().lstrip("+-").isdecimal() and abs(int(text)) < 2**31:
        return int(text)
    raise ValueError(f"{where}: label must be a whole number, got {text!r}")


class Captioned(Protocol):
    """Images with a text each.

    Attributes:
        labels: Class indices, int64 `[N]`, or None if there are none.
        templated: Whether the texts are templates filled with class names.
    """

    labels: Tensor | None
    templated: bool

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Image.Image, str]:
        """Return an image in RGB and its text, which is empty if texts are templated.

        Raises:
            OSError: If the image or its text cannot be read.
        """
        ...

    def name(self, index: int) -> str:
        """Return the location of an image, for messages."""
        ...


class Folder:
    """A set of `clip.data.imagenet`, whose texts are templates filled with class names."""

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
    """A CSV or TSV of image files and captions, optionally with labels.

    The columns are named `filepath` or `image`, `title` or `caption`, and `label`. Image files are relative
    to the table's folder.

    Args:
        file: The table.
        read: The function that reads an image.
        label: The function that turns a label into a class index.
        captioned: Whether captions are required. If not, a table of labels alone is one whose texts are
            templates filled with class names.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a column is missing or a row is incomplete; the message says which.
    """

    def __init__(
        self,
        file: Path,
        *,
        read: Read = imagenet.read_image,
        label: Label = whole_number,
        captioned: bool = True,
    ):
        if not file.is_file():
            raise FileNotFoundError(f"no table of captions {file}: give an existing .csv or .tsv")
        self.file, self._read, self._label, self._captioned = file, read, label, captioned
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
            image = self._column(names, _IMAGE_COLUMNS)
            label = names.index(_LABEL_COLUMN) if _LABEL_COLUMN in names else None
            self.templated = (
                not self._captioned and label is not None and not set(_CAPTION_COLUMNS) & {*names}
            )
            caption = None if self.templated else self._column(names, _CAPTION_COLUMNS)
            for row in self._whole(rows, len(names)):
                self.files.append(row[image])
                self.captions.append("" if caption is None else row[caption])
                if label is not None:
                    labels.append(self._label(row[label], f"{self.file}, line {rows.line_num}"))
        return None if label is None else torch.tensor(labels)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[Image.Image, str]:  # noqa: D102
        return self._read(self.name(index)), self.captions[index]

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
                        f"{columns}; it is cut off there or damaged: get it again, or repair the line"
                    )
                yield row
        except csv.Error as error:
            raise ValueError(
                f"{self.file}, line {rows.line_num}: {error}: it is cut off there, or a quotation mark is "
                "not closed; get it again, or repair it"
            ) from error


class Shards:
    """Tar files in WebDataset's layout: an image, a `.txt`, and optionally a class in `.cls` for each key.

    The archives are listed once and then read at random positions, so that their pairs can be shuffled and
    resumed like any others.

    Args:
        pattern: Files, with braces as in WebDataset: `cc3m-{0000..0331}.tar`.
        read: The function that reads an image.
        label: The function that turns a label into a class index.
        captioned: Whether a `.txt` is required. If not, an image may have a `.cls` alone; if none has a
            `.txt`, the texts are templates filled with class names.

    Attributes:
        left_out: The samples without an image or a text.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If an archive cannot be read, is cut off, or has no pairs.
    """

    def __init__(
        self,
        pattern: str,
        *,
        read: Read = imagenet.read_image,
        label: Label = whole_number,
        captioned: bool = True,
    ):
        self._read = read
        try:
            from webdataset.shardlists import expand_urls
        except ImportError as error:
            raise ImportError("tar shards need WebDataset: pip install 'wmateacher[data]'") from error
        self.pairs: list[tuple[str, str, tuple[int, int], tuple[int, int] | None]] = []
        self.left_out: list[str] = []
        labels: list[int] = []
        for file in expand_urls(pattern):
            for key, parts in _listed(Path(file)).items():
                image = next((parts[e] for e in _IMAGES if e in parts), None)
                if image is None or (_TEXT not in parts and (captioned or _LABEL not in parts)):
                    self.left_out.append(f"{key} in {file}")
                    continue
                self.pairs.append((file, key, image, parts.get(_TEXT)))
                if _LABEL in parts:
                    text = _content(file, parts[_LABEL]).decode("utf-8", "replace")
                    labels.append(label(text, f"{key}.{_LABEL} in {file}"))
        if not self.pairs:
            raise ValueError(
                f"no pairs in {pattern}: each needs an image ({', '.join(_IMAGES)}) and a .{_TEXT} of the "
                "same name" + ("" if captioned else f", or a .{_LABEL} with its class")
            )
        texts = sum(text is not None for *_, text in self.pairs)
        if 0 < texts < len(self.pairs):
            raise ValueError(
                f"{texts} of {len(self.pairs)} images in {pattern} have a .{_TEXT}: give all one, or none"
            )
        self.templated = texts == 0
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
            caption = "" if text is None else _content(file, text).decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise OSError(f"the text of {self.name(index)} is not in UTF-8 ({error})") from error
        return self._read(BytesIO(_content(file, image))), caption

    def name(self, index: int) -> str:  # noqa: D102
        file, key, *_ = self.pairs[index]
        return f"{key} in {file}"


def _listed(file: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Return key -> extension -> (offset, size) of an archive's members."""
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
    """Open image-text pairs.

    Args:
        where: A name of `imagenet.SETS` with all 1,000 classes, a `.csv` or `.tsv` file, or a pattern of
            `.tar` files.
        root: The folder that holds the sets, and that other paths are relative to.

    Raises:
        ValueError: If `where` names no such set or file, or the pairs are damaged.
        FileNotFoundError: If the pairs are missing.
    """
    if where in imagenet.SETS:
        if imagenet.SETS[where].classes != imagenet.CLASSES:
            whole = [name for name, s in imagenet.SETS.items() if s.classes == imagenet.CLASSES]
            raise ValueError(
                f"{where!r} has {imagenet.SETS[where].classes} classes, with indices of its own, and is a "
                f"test set: train on {', '.join(whole)}, or on a table of captions"
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
    """Check that labels, if there are any, are indices of the classes.

    Raises:
        ValueError: If one is not; the message says which.
    """
    if data.labels is None:
        return
    wrong = ((data.labels < 0) | (data.labels >= classes)).nonzero()[:, 0].tolist()
    if wrong:
        raise ValueError(
            f"labels must be in 0 ... {classes - 1}, got {int(data.labels[wrong[0]])} of "
            f"{data.name(wrong[0])}, and {len(wrong) - 1} more outside: they index ImageNet's classes"
        )
