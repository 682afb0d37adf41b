"""What is in a folder of data sets, what is wrong with it, and how to get what is missing.

python -m wmateacher.integrations.clip.data.check DATA_ROOT
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from wmateacher.integrations.clip.data import files, imagenet
from wmateacher.integrations.engine import tables


@dataclass(frozen=True)
class Finding:
    """What was found of one set.

    Attributes:
        name: Of the set.
        where: Its folder; None where it is missing.
        images: Their number.
        classes: How many classes have images; 0 where they have captions alone.
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
    """Look at a table of captions, or at tar shards.

    Args:
        where: As `files.load` takes it, relative to `root`.
        root: A folder.
        read: As in `check`.
        progress: As in `check`.
    """
    try:
        found = files.load(where, root)
        files.check_labels(found, len(imagenet.CLASSES))
    except FileNotFoundError as error:
        return Finding(where, problems=(str(error),))
    except (ValueError, OSError, ImportError) as error:
        return Finding(where, root / where, problems=(str(error),))
    problems = _unreadable(found, where, progress) if read else []
    return Finding(where, root / where, len(found), _classes(found), tuple(problems))


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


def main() -> None:
    """Check a data root; exit 1 where something is missing or wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m wmateacher.integrations.clip.data.check",
        description="Look at a folder that holds ImageNet, the five sets it is shifted to, or captions.",
    )
    parser.add_argument("root", type=Path, metavar="DATA_ROOT", help="the folder that holds the sets")
    parser.add_argument("--sets", nargs="*", choices=list(imagenet.SETS), help="only these; none: no set")
    parser.add_argument(
        "--pairs", nargs="+", default=[], metavar="FILE",
        help="tables of captions (.csv, .tsv) and tar shards (cc3m-{0000..0331}.tar) to look at, too",
    )  # fmt: skip
    parser.add_argument("--read", action="store_true", help="read every image, too, which takes long")
    arguments = parser.parse_args()
    if not arguments.root.is_dir():
        parser.error(f"no folder {arguments.root}: give the folder that holds the data sets")
    names = list(imagenet.SETS) if arguments.sets is None else arguments.sets
    findings = [check(name, arguments.root, arguments.read, progress=True) for name in names]
    findings += [
        check_pairs(where, arguments.root, arguments.read, progress=True) for where in arguments.pairs
    ]
    if not findings:
        parser.error("nothing to look at: name sets or pairs")
    print(table(findings))
    sys.exit(any(f.problems for f in findings))


if __name__ == "__main__":
    main()
