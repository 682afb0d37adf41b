"""Classify the images of a folder by a saved model, and write their classes as CSV.

    python -m wmateacher.integrations.clip.predict MODEL DIR --output classes.csv

The columns are `path`, relative to the folder, `class` and `confidence`.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TextIO

import torch
import tyro
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from wmateacher.files import write_atomically
from wmateacher.integrations.clip import export
from wmateacher.integrations.clip.data.classes import read_classes
from wmateacher.integrations.clip.data.images import SUFFIXES, read_image
from wmateacher.integrations.clip.data.templates import read_templates
from wmateacher.integrations.engine import command, processes, signals

__all__ = ["Options", "Prediction", "images_in", "main", "predict"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Classify the images of a folder, also those in its subfolders, by a saved model; write CSV."""

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """Model folder, such as RUN/models/tracer-0/student."""
    images: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """Folder of images."""
    output: Path | None = None
    """CSV file to write, or None for the standard output."""
    classes: Path | None = None
    """Text file with one class name per line, to use instead of the model's."""
    templates: tuple[str, ...] = ()
    """Captions such as `a photo of a {}.`, openai, simple, or text files with one per line, to use instead of
    the model's."""
    batch_size: int = 64
    """Images per batch."""
    workers: int = 0
    """Worker processes that read images."""
    device: str = "auto"
    """cpu, cuda or cuda:N. auto is a GPU if there is one."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"--batch-size must be at least 1, got {self.batch_size}")
        if self.workers < 0:
            raise ValueError(f"--workers must be at least 0, got {self.workers}")


@dataclass(frozen=True)
class Prediction:
    """The answer for an image file.

    Attributes:
        path: The file.
        answer: The class and its probability, or None if the file cannot be read.
        error: The reason why it cannot be read.
    """

    path: Path
    answer: export.Answer | None
    error: str = ""


def images_in(folder: Path) -> list[Path]:
    """Return the image files in a folder and its subfolders, sorted.

    Raises:
        FileNotFoundError: If there is no such folder, or it holds no images.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {str(folder)!r}: give a folder of images")
    found = sorted(p for p in folder.rglob("*") if p.name.lower().endswith(SUFFIXES) and p.is_file())
    if not found:
        raise FileNotFoundError(
            f"no images in {str(folder)!r} or its subfolders: their names must end in " + ", ".join(SUFFIXES)
        )
    return found


def predict(
    model: export.SavedModel, paths: Sequence[Path], *, batch_size: int = 64, workers: int = 0
) -> Iterator[Prediction]:
    """Classify image files.

    Args:
        model: The model.
        paths: The files.
        batch_size: Images per batch.
        workers: Worker processes that read images; 0 reads them in this process.

    Yields:
        The prediction of each file, in order.
    """
    loader: DataLoader[Any] = DataLoader(
        _Files(paths, model.transform), batch_size=batch_size, num_workers=workers,
        collate_fn=list, worker_init_fn=signals.leave_to_main,
    )  # fmt: skip
    for batch in loader:
        read = [image for _, image, _ in batch if image is not None]
        answers = iter(model.answers(torch.stack(read)) if read else [])
        for path, image, error in batch:
            yield Prediction(path, None if image is None else next(answers), error)


class _Files(Dataset[Any]):
    """(file, image or None, the reason why there is none)."""

    def __init__(self, paths: Sequence[Path], transform: Any):
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Path, Tensor | None, str]:
        path = self.paths[index]
        try:
            return path, self.transform(read_image(str(path))), ""
        except OSError as error:
            return path, None, str(error)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: The arguments; those of the process by default.

    Returns:
        The exit code: 0, or 1 if images could not be read.

    Raises:
        ValueError: If the model folder is not one, or does not fit the options.
        FileNotFoundError: If a folder or file is missing, or there are no images.
    """
    program = "python -m wmateacher.integrations.clip.predict"
    options = tyro.cli(Options, args=argv, prog=program, description=__doc__)
    paths = images_in(options.images)
    classes = None if options.classes is None else read_classes(options.classes).names
    templates = read_templates(options.templates) if options.templates else None
    with processes.process_group(options.device) as device:
        model = export.load(options.model, device, classes=classes, templates=templates)
        found = predict(model, paths, batch_size=options.batch_size, workers=options.workers)
        unreadable = 0
        with _text(options.output) as text:
            rows = csv.writer(text, lineterminator="\n")
            rows.writerow(["path", "class", "confidence"])
            for one in tqdm(found, total=len(paths), unit="image", disable=None):
                if one.answer is None:
                    unreadable += 1
                    tqdm.write(f"skipped: {one.error}", file=sys.stderr)
                else:
                    rows.writerow([one.path.relative_to(options.images), *one.answer])
    if unreadable:
        print(f"{unreadable} of {len(paths)} images cannot be read and were skipped", file=sys.stderr)
    return int(unreadable > 0)


@contextmanager
def _text(output: Path | None) -> Iterator[TextIO]:
    if output is None:
        yield sys.stdout
        return
    with write_atomically(output) as stream:
        # Names of files may be in any encoding.
        text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
        yield text
        text.detach()


if __name__ == "__main__":
    command.run(lambda: sys.exit(main()))
