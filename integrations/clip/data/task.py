"""Your own images: class folders, tables or shards, read as one classification task."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from wmateacher.checks import nearest
from wmateacher.integrations.clip.data import files
from wmateacher.integrations.clip.data.classes import Classes, clean, from_labels, read_classes
from wmateacher.integrations.clip.data.files import Captioned
from wmateacher.integrations.clip.data.folders import ClassFolders
from wmateacher.integrations.clip.data.images import SUFFIXES, read_image
from wmateacher.integrations.engine import tables
from wmateacher.integrations.engine.sampling import generator, hold_out

__all__ = ["Pairs", "Task", "Test", "load"]

_FEW = 5


class Pairs(Dataset[Any]):
    """Some images of a source, with their class indices; to train on (`Captioned`) and to score.

    Args:
        source: The images with their texts.
        labels: The class of every image of the source, int64 `[M]`, or None if there are none.
        indices: The images, int64 `[N]`.

    Attributes:
        labels: Their classes, int64 `[N]`, or None.
        templated: Whether texts are templates filled with class names.
    """

    def __init__(self, source: Captioned, labels: Tensor | None, indices: Tensor):
        self._source, self._indices = source, indices
        self.labels = None if labels is None else labels[indices]
        self.templated = source.templated

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int) -> tuple[Image.Image, str]:
        """Return an image in RGB and its text."""
        return self._source.read(int(self._indices[index]))

    def name(self, index: int) -> str:
        """Return the location of an image, for messages."""
        return self._source.name(int(self._indices[index]))

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Return an image in RGB and its class."""
        assert self.labels is not None
        return self.read(index)[0], int(self.labels[index])


@dataclass(frozen=True)
class Test:
    """Images to score among all classes of a task.

    Attributes:
        images: The images.
        classes: The number of classes.
    """

    images: Pairs
    classes: int

    @staticmethod
    def logits_of(logits: Tensor) -> Tensor:
        """Return the logits themselves, `[B, classes]`."""
        return logits


@dataclass(frozen=True)
class Task:
    """A classification task: classes, and images to train, to validate and to test on.

    Attributes:
        classes: The class names, in the order of the labels.
        train: The images to train on.
        validation: Those that were held out of training, or None.
        tests: The test sets by name; the first is in-distribution.
        notes: Sentences on images that were left out and on classes with few or no training images.
        digest: A digest of the names and the labels of all images.
    """

    classes: tuple[str, ...]
    train: Pairs
    validation: Pairs | None
    tests: Mapping[str, Pairs]
    notes: tuple[str, ...]
    digest: str

    def table(self) -> str:
        """Return a table of the sets, and the notes."""
        sets = {"training": self.train, "validation": self.validation, **self.tests}
        rows = [
            {
                "set": name,
                "images": f"{len(pairs):,}",
                "classes": "captions only" if pairs.labels is None else str(len(pairs.labels.unique())),
                "images of a class": "" if pairs.labels is None else _range(pairs.labels),
            }
            for name, pairs in sets.items()
            if pairs is not None
        ]
        return "\n".join([tables.aligned(rows), *self.notes])


def _range(labels: Tensor) -> str:
    counts = labels.unique(return_counts=True)[1]
    low, high = int(counts.min()), int(counts.max())
    return str(low) if low == high else f"{low} to {high}"


def load(
    train: str,
    tests: Sequence[tuple[str, str]] = (),
    *,
    root: Path | None = None,
    classes: str | None = None,
    validation: float = 0.1,
    shots: int | None = None,
    seed: int = 0,
) -> Task:
    """List the images of a task. No image is read yet.

    Args:
        train: The training images: a folder of class folders, a `.csv` or `.tsv` file with the columns
            filepath, title and label (one of the last two suffices), or a pattern of `.tar` shards in
            WebDataset's layout.
        tests: Names of test sets and their images, given like `train`; all must have labels.
        root: The folder that paths are relative to. Default: the working directory.
        classes: A file for `read_classes`. By default the classes are the labels of the training images.
        validation: The share of the training images to hold out, with the classes in the same proportions.
        shots: The number of images of each class to train on, drawn by `seed` from those that are not held
            out. Default: all.
        seed: The seed of `shots`.

    Raises:
        ValueError: If something is damaged, empty, double, or of no known class.
        FileNotFoundError: If a folder or file is missing.
    """
    known = None if classes is None else read_classes(_path(classes, root))
    whole, written = _open(train, "--train", root)
    if known is None:
        if written is None:
            raise ValueError(
                f"{train} has captions and no labels, so the classes are unknown: add a label column, or "
                "list the classes with --classes FILE"
            )
        known = from_labels((label for label, _ in written), train)
    labels = _labels(known, whole, written, train)
    notes = _notes(whole, train)
    if not known.listed:
        _check_full(whole)
    every = torch.arange(len(whole))
    held = torch.zeros(len(whole), dtype=torch.bool)
    if labels is not None:
        most = len(whole) - len(labels.unique())  # each class keeps an image to train on
        wanted = max(1, round(validation * len(whole))) if validation else 0
        held = hold_out(labels, min(wanted, most))
        if missing := [n for i, n in enumerate(known.names) if not (labels == i).any()]:
            notes.append(f"{_some(missing)}: no training images")
    elif validation:
        notes.append("nothing is held out for validation, because training images have no labels")
    kept = every[~held]
    if shots is not None:
        kept = _few(kept, labels, shots, seed, train, known, notes)
    digest = hashlib.sha256(repr(known.names).encode())
    _digest(digest, Pairs(whole, labels, kept))
    _digest(digest, Pairs(whole, labels, every[held]))
    seen = {os.path.realpath(whole.name(i)) for i in range(len(whole))}
    sets: dict[str, Pairs] = {}
    for name, where in tests:
        if name in sets or not name.strip() or "/" in name:
            raise ValueError(f"--tests: give each test set a name of its own without '/', got {name!r}")
        images, theirs = _open(where, f"--tests {name}", root)
        if theirs is None:
            raise ValueError(f"test set {name!r}: {where} has no labels: add a label column")
        sets[name] = Pairs(images, _labels(known, images, theirs, where), torch.arange(len(images)))
        notes += _notes(images, where)
        both = [i for i in range(len(images)) if os.path.realpath(images.name(i)) in seen]
        if both:
            raise ValueError(
                f"test set {name!r}: {len(both):,} of its {len(images):,} images are training images, too, "
                f"such as {images.name(both[0])}: give it images of its own"
            )
        _digest(digest, sets[name])
    held_out = Pairs(whole, labels, every[held]) if held.any() else None
    if held_out is None and not sets:
        raise ValueError(
            "there is nothing to measure the accuracy on: name a test set (--tests NAME DIR), or hold out "
            "training images with labels (--validation 0.1)"
        )
    return Task(
        known.names, Pairs(whole, labels, kept), held_out, sets, tuple(notes), digest.hexdigest()[:16]
    )


def _path(where: str, root: Path | None) -> Path:
    return Path(where) if root is None else root / where


def _open(where: str, option: str, root: Path | None) -> tuple[Captioned, list[tuple[str, str]] | None]:
    """Open images, and return each one's label as written with its place, or None if they have none."""
    written: list[tuple[str, str]] = []

    def keep(text: str, place: str) -> int:
        written.append((text, place))
        return len(written) - 1

    if not where:
        raise ValueError(
            f"{option} is missing: name a folder of class folders, a .csv or .tsv, or .tar shards"
        )
    path = _path(where, root)
    source: Captioned
    if path.is_dir():
        source = ClassFolders(path, keep)
        # A class folder's label stands once for all of its images.
        assert source.labels is not None
        written = [written[i] for i in source.labels.tolist()]
    elif path.suffix.lower() in (".csv", ".tsv"):
        source = files.Table(path, read=read_image, label=keep, captioned=False)
    elif ".tar" in path.name.lower():
        source = files.Shards(str(path), read=read_image, label=keep, captioned=False)
    elif path.exists():
        raise ValueError(
            f"{option}: cannot tell what {path} is: give a folder, a .csv, a .tsv or .tar shards"
        )
    else:
        raise FileNotFoundError(f"{option}: there is no {path}")
    if isinstance(source, (ClassFolders, files.Table)):
        absent = [name for i in range(len(source)) if not os.path.isfile(name := source.name(i))]
        if absent:
            raise FileNotFoundError(
                f"{option}: {len(absent):,} of {len(source):,} image files of {path} are missing, such as "
                f"{absent[0]}: a table's paths are relative to its folder; a link may be broken"
            )
    if isinstance(source, files.Table) and not source.templated:
        blank = [source.name(i) for i, text in enumerate(source.captions) if not text.strip()]
        if blank and option == "--train":
            raise ValueError(
                f"{path}: {len(blank):,} captions are empty, such as that of {blank[0]}: fill them in, or "
                "leave the column out to train on templates with class names"
            )
    return source, None if source.labels is None else written


def _labels(
    known: Classes, source: Captioned, written: list[tuple[str, str]] | None, where: str
) -> Tensor | None:
    """Return class indices.

    Raises:
        ValueError: If a label is of no known class.
    """
    if written is None:
        return None
    labels = torch.tensor([known.label(*each) for each in written])
    wrong = (labels < 0).nonzero()[:, 0].tolist()
    if wrong:
        unknown = list(dict.fromkeys(written[i][0] for i in wrong))
        raise ValueError(
            f"{where}: {_some(unknown)} of {len(wrong):,} images, such as {source.name(wrong[0])}, "
            f"{'is not a class' if len(unknown) == 1 else 'are not classes'} of "
            f"{'the list of classes' if known.listed else 'the training images'}; "
            f"{nearest(clean(unknown[0]), known.names)}. Rename, remove, or list all classes with --classes "
            "FILE"
        )
    return labels


def _notes(source: Captioned, where: str) -> list[str]:
    """Return what was left out of images."""
    notes = []
    if left_out := getattr(source, "left_out", []):
        notes.append(
            f"left out of {where}: {len(left_out):,} that are no images of a class, such as {left_out[0]}"
        )
    if empty := getattr(source, "empty", []):
        notes.append(f"without images: {_some(empty)}")
    return notes


def _check_full(source: Captioned) -> None:
    """Check that every class folder has images."""
    empty = getattr(source, "empty", [])
    if empty:
        raise ValueError(
            f"no images in class folders {_some(empty)} (suffixes {' '.join(SUFFIXES)}): add some, remove "
            "the folder, or list the classes with --classes FILE"
        )


def _few(
    kept: Tensor,
    labels: Tensor | None,
    shots: int,
    seed: int,
    where: str,
    known: Classes,
    notes: list[str],
) -> Tensor:
    """Return `shots` images of each class, or all of them where there are fewer."""
    if labels is None:
        raise ValueError(f"--shots {shots} needs labels, {where} has captions only")
    chosen, short = [], []
    for label in labels[kept].unique().tolist():
        members = kept[labels[kept] == label]
        order = torch.randperm(len(members), generator=generator(seed, 3, label))
        chosen.append(members[order[:shots]])
        if len(members) < shots:
            short.append(f"{known.names[label]} ({len(members)})")
    if short:
        notes.append(f"fewer than {shots} training images: {_some(short)}")
    return torch.cat(chosen).sort().values


def _digest(digest: Any, pairs: Pairs) -> None:
    labels = [-1] * len(pairs) if pairs.labels is None else pairs.labels.tolist()
    for i, label in enumerate(labels):
        digest.update(f"{pairs.name(i)}\0{label}\n".encode(errors="surrogateescape"))


def _some(names: Sequence[str]) -> str:
    """Return the first few names, and how many there are besides."""
    more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
    return ", ".join(map(repr, names[:_FEW])) + more


def __dir__() -> list[str]:
    return __all__
