"""Images in one folder for each class."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from wmateacher.integrations.clip.data.files import Label
from wmateacher.integrations.clip.data.images import SUFFIXES, read_image

__all__ = ["ClassFolders"]


class ClassFolders:
    """Images in one folder for each class, at any depth; texts are templates filled with class names.

    Hidden files are left out, and files without the suffix of an image. Symbolic links are followed.

    Args:
        folder: The folder that holds the class folders.
        label: The function that turns the name of a class folder into a class index.

    Attributes:
        files: The paths, sorted.
        empty: The class folders without images.
        left_out: The files that are neither hidden nor images.
        labels: The class indices, int64 `[N]`.

    Raises:
        ValueError: If there are no class folders.
    """

    templated = True

    def __init__(self, folder: Path, label: Label):
        entries = sorted(e for e in folder.iterdir() if not e.name.startswith("."))
        self.files: list[str] = []
        self.empty: list[str] = []
        self.left_out = [str(e) for e in entries if not e.is_dir()]
        labels: list[int] = []
        for entry in (e for e in entries if e.is_dir()):
            found = list(_walk(entry))
            images = [f for f in found if f.lower().endswith(SUFFIXES)]
            self.left_out += [f for f in found if not f.lower().endswith(SUFFIXES)]
            if images:
                labels += [label(entry.name, str(entry))] * len(images)
                self.files += images
            else:
                self.empty.append(str(entry))
        if not self.files:
            raise ValueError(
                f"{folder} has no class folders with images: make one folder for each class in it, with "
                f"files such as {folder}/cat/1.jpg"
            )
        self.labels: Tensor | None = torch.tensor(labels)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[Image.Image, str]:  # noqa: D102
        return read_image(self.files[index]), ""

    def name(self, index: int) -> str:  # noqa: D102
        return self.files[index]


def _walk(folder: Path) -> Iterator[str]:
    """Yield the files below a folder that are not hidden, sorted, each folder once."""

    def fail(error: OSError) -> None:
        raise error

    seen: set[str] = set()
    for where, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:  # a link to a folder that was listed, perhaps one above it
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        yield from (os.path.join(where, n) for n in sorted(names) if not n.startswith("."))


def __dir__() -> list[str]:
    return __all__
