"""The classes of a task: their names, and the labels that stand for them."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Classes", "clean", "from_labels", "read_classes"]


def clean(name: str) -> str:
    """Return a class name without underscores and surplus spaces."""
    return " ".join(name.replace("_", " ").split())


def _key(label: str) -> str:
    """Return the form in which labels are compared: CLIP reads texts in lower case, `003` is 3."""
    key = clean(label).casefold()
    return str(int(key)) if key.isdecimal() else key


@dataclass(frozen=True)
class Classes:
    """The classes of a task.

    Attributes:
        names: The class names that CLIP reads.
        index: The class of each label, by its form for comparison.
        listed: Whether they come from a file, so that a class need not have training images.
    """

    names: tuple[str, ...]
    index: Mapping[str, int]
    listed: bool

    def label(self, text: str, where: str) -> int:
        """Return the class index of a label as written, or -1 if it is unknown.

        Raises:
            ValueError: If the label is empty.
        """
        if not clean(text):
            raise ValueError(f"{where}: the label is empty: give each image its class")
        return self.index.get(_key(text), -1)


def read_classes(file: Path) -> Classes:
    """Read the classes that a text file lists.

    A line holds a class name, or a label and a class name with a tab between them (in a `.csv` a comma). A
    line's label is a folder's name, or what stands in the label column. Without labels, the names are the
    labels; labels that are numbers count the lines from 0.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is damaged or double, or there are no classes.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}: --classes names a text file with one class on each line")
    names: dict[str, int] = {}
    index: dict[str, int] = {}
    pairs = 0
    for number, row in _rows(file):
        if not 1 <= len(row) <= 2 or not all(row):
            raise ValueError(
                f"{file}, line {number}: give a class name, or a label and a class name, got {row}"
            )
        pairs += len(row) == 2
        position = names.setdefault(row[-1], len(names))
        for label in {_key(cell) for cell in (row[:1] if len(row) == 2 else row)}:
            if label in index:
                raise ValueError(f"{file}, line {number}: {row[0]!r} is there already: list each class once")
            index[label] = position
    _check_distinct(names, str(file))
    if not names:
        raise ValueError(f"{file} lists no classes: give one on each line")
    if pairs and pairs < len(index):
        raise ValueError(f"{file} has labels on {pairs} of {len(index)} lines: give all a label, or none")
    numbers = (
        {} if pairs or any(label.isdecimal() for label in index) else {str(i): i for i in range(len(names))}
    )
    return Classes(tuple(names), {**numbers, **index}, listed=True)


def _rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the cells of every line that is not blank."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            if file.suffix.lower() != ".csv":
                for number, line in enumerate(stream, 1):
                    if line.strip():
                        yield number, [cell.strip() for cell in line.split("\t")]
                return
            rows = csv.reader(stream, strict=True)
            for row in rows:
                if any(cell.strip() for cell in row):
                    yield rows.line_num, [cell.strip() for cell in row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file} is not text in UTF-8 with whole lines ({error}): repair it") from error


def _check_distinct(names: Iterable[str], where: str) -> None:
    """Check that CLIP reads names as different texts."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(clean(name).casefold(), name)
        if other != name:
            raise ValueError(
                f"{where}: {other!r} and {name!r} are one class name to CLIP, {clean(name)!r}: rename one, "
                "put their images together, or name both with --classes FILE"
            )


def from_labels(labels: Iterable[str], where: str) -> Classes:
    """Return the classes of training labels, named after them."""
    written = sorted(set(labels))
    _check_distinct(written, where)
    if all(_key(label).removeprefix("n").isdecimal() for label in written):
        raise ValueError(
            f"the labels of {where} are numbers, such as {written[0]!r}, which say nothing to CLIP: name the "
            "classes with --classes FILE, on each line a label, a tab and a class name"
        )
    index = {_key(label): i for i, label in enumerate(written)}
    if len(index) < len(written):
        raise ValueError(f"labels of {where} are the same number, written differently: {written}")
    return Classes(tuple(map(clean, written)), index, listed=False)


def __dir__() -> list[str]:
    return __all__
