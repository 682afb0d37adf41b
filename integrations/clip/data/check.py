"""Check a folder of data sets: report contents and problems, and where to get the sets that are missing.

python -m wmateacher.integrations.clip.data.check DATA_ROOT
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from wmateacher.integrations.clip.data import files, imagenet
from wmateacher.integrations.engine import tables

__all__ = ["Finding", "check", "check_pairs", "main", "table"]


@dataclass(frozen=True)
class Finding:
    """The state of one data set.

    Attributes:
        name: The name of the set.
        where: The folder of the set, or None if it is missing.
        images: The number of images.
        classes: The number of classes that have images; 0 if the images have captions only.
        problems: The problems found, each with a fix.
    """

    name: str
    where: Path | None = None
    images: int = 0
    classes: int = 0
    problems: tuple[str, ...] = ()


def check(name: str, root: Path, read: bool = False, progress: bool = False) -> Finding:
    """Check one of ImageNet's sets.

    Args:
        name: A name of `imagenet.SETS`.
        root: The folder that holds the sets.
        read: Whether to read every image, too, which is slow.
        progress: Whether to show a progress bar while reading in a terminal.
    """
    wanted = imagenet.SETS[name]
    try:
        where = imagenet.find(name, root)
    except FileNotFoundError as error:
        return Finding(name, problems=(str(error),))
    try:
        found = files.Folder(name, root)
    except (ValueError, OSError) as error:
        return Finding(name, where, problems=(str(error),))
    images, classes = len(found), _classes(found)
    problems = []
    if classes != wanted.classes:
        problems.append(f"{classes} of {wanted.classes} classes have images; get {wanted.source}")
    if images != wanted.images:
        problems.append(f"{images:,} images where the published set has {wanted.images:,}")
    if read:
        problems += _unreadable(found, name, progress)
    return Finding(name, where, images, classes, tuple(problems))


def check_pairs(where: str, root: Path, read: bool = False, progress: bool = False) -> Finding:
    """Check a table of captions, or tar shards.

    Args:
        where: The pairs, as for `files.load`.
        root: The folder that `where` is relative to.
        read: Whether to read every image, too, which is slow.
        progress: Whether to show a progress bar while reading in a terminal.
    """
    try:
        found = files.load(where, root)
        files.check_labels(found, imagenet.CLASSES)
    except FileNotFoundError as error:
        return Finding(where, problems=(str(error),))
    except (ValueError, OSError, ImportError) as error:
        return Finding(where, root / where, problems=(str(error),))
    problems = _unreadable(found, where, progress) if read else []
    return Finding(where, root / where, len(found), _classes(found), tuple(problems))


def table(findings: list[Finding]) -> str:
    """Return a table with one row per set, followed by the problems."""
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
    return "\n".join([tables.aligned(rows), *([""] if below else []), *below])


def _classes(found: files.Captioned) -> int:
    return 0 if found.labels is None else len(found.labels.unique())


def _unreadable(found: files.Captioned, name: str, progress: bool) -> list[str]:
    bad = []
    for i in tqdm(range(len(found)), desc=name, unit="image", disable=None if progress else True):
        try:
            found.read(i)
        except OSError:
            bad.append(f"cannot be read as an image: {found.name(i)}")
    return bad


def main(argv: Sequence[str] | None = None) -> None:
    """Check a data root; exit with 1 if anything is missing or wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m wmateacher.integrations.clip.data.check",
        description="Check a folder that holds ImageNet, its five shifted test sets, or captions.",
    )
    parser.add_argument("root", type=Path, metavar="DATA_ROOT", help="the folder that holds the sets")
    parser.add_argument(
        "--sets", nargs="*", choices=list(imagenet.SETS), help="check only these; none: no set"
    )
    parser.add_argument(
        "--pairs", nargs="+", default=[], metavar="FILE",
        help="tables of captions (.csv, .tsv) and tar shards (cc3m-{0000..0331}.tar) to check, too",
    )  # fmt: skip
    parser.add_argument("--read", action="store_true", help="read every image, too, which is slow")
    arguments = parser.parse_args(argv)
    if not arguments.root.is_dir():
        parser.error(f"no folder {arguments.root}: give the folder that holds the data sets")
    names = list(imagenet.SETS) if arguments.sets is None else arguments.sets
    findings = [check(name, arguments.root, arguments.read, progress=True) for name in names]
    findings += [
        check_pairs(where, arguments.root, arguments.read, progress=True) for where in arguments.pairs
    ]
    if not findings:
        parser.error("nothing to check: name sets or pairs")
    print(table(findings))
    sys.exit(any(f.problems for f in findings))


if __name__ == "__main__":
    main()
