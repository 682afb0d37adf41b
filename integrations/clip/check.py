"""What is in a folder of data sets, what is wrong with it, and how to get what is missing.

python -m wmateacher.integrations.clip.check DATA_ROOT
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from wmateacher.integrations import report
from wmateacher.integrations.clip import imagenet


@dataclass(frozen=True)
class Finding:
    """What was found of one set.

    Attributes:
        name: Of the set.
        where: Its folder; None where it is missing.
        images: Their number, and of classes that have any.
        classes: Number of classes that have images.
        problems: What is wrong, each with its remedy; empty: all is well.
    """

    name: str
    where: Path | None = None
    images: int = 0
    classes: int = 0
    problems: tuple[str, ...] = ()


def check(name: str, root: Path, read: bool = False, progress: bool = False) -> Finding:
    """Look at one set.

    Args:
        name: One of `imagenet.SETS`.
        root: The folder that holds the sets.
        read: Read every image, too, which takes long.
        progress: Show a bar while reading, where there is a terminal.
    """
    wanted = imagenet.SETS[name]
    try:
        where = imagenet.find(name, root)
    except FileNotFoundError as error:
        return Finding(name, problems=(str(error),))
    try:
        found = imagenet.load(name, root)
    except (ValueError, OSError) as error:
        return Finding(name, where, problems=(str(error),))
    images, classes = len(found.images), len(found.images.labels.unique())
    problems = []
    if classes != wanted.classes:
        problems.append(f"{classes} of {wanted.classes} classes have images; get {wanted.source}")
    if images != wanted.images:
        problems.append(f"{images:,} images where the published set has {wanted.images:,}")
    if read:
        bad = _unreadable(found.images, name, progress)
        problems += [f"cannot be read as an image: {file}" for file in bad]
    return Finding(name, where, images, classes, tuple(problems))


def table(findings: list[Finding]) -> str:
    """One row a set, and under them all that is wrong."""
    rows = [
        {
            "set": f.name,
            "images": f"{f.images:,}" if f.images else "",
            "classes": str(f.classes) if f.classes else "",
            "": "missing" if f.where is None else ("look below" if f.problems else "ok"),
        }
        for f in findings
    ]
    below = [f"{f.name}: {problem}" for f in findings for problem in f.problems]
    return "\n".join([report.aligned(rows), *([""] if below else []), *below])


def _unreadable(photos: imagenet.Photos, name: str, progress: bool) -> list[str]:
    bad = []
    for i in tqdm(range(len(photos)), desc=name, unit="image", disable=None if progress else True):
        try:
            photos[i]
        except imagenet.UNREADABLE:
            bad.append(photos.files[i])
    return bad


def main() -> None:
    """Check a data root; exit 1 where something is missing or wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m wmateacher.integrations.clip.check",
        description="Look at a folder that holds ImageNet and the five sets it is shifted to.",
    )
    parser.add_argument("root", type=Path, metavar="DATA_ROOT", help="the folder that holds the sets")
    parser.add_argument("--sets", nargs="+", choices=list(imagenet.SETS), help="only these")
    parser.add_argument("--read", action="store_true", help="read every image, too, which takes long")
    arguments = parser.parse_args()
    if not arguments.root.is_dir():
        parser.error(f"no folder {arguments.root}: give the folder that holds the data sets")
    names = arguments.sets or list(imagenet.SETS)
    findings = [check(name, arguments.root, arguments.read, progress=True) for name in names]
    print(table(findings))
    sys.exit(any(f.problems for f in findings))


if __name__ == "__main__":
    main()
