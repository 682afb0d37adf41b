"""Build the folder of pictograms that `data.pictograms` reads from five published packages of emoji.

    npm pack emoji-datasource-twitter@16.0.0 emoji-datasource-google@16.0.0 openmoji@17.0.0
    npm pack @lobehub/fluent-emoji-3d@1.1.0 emojibase-data@17.0.0
    pip install cairosvg
    python -m wmateacher.integrations.clip.data.emoji --packages . --output DIR

The pictures have licences of their own: CC BY 4.0 (twemoji), Apache 2.0 (noto), CC BY-SA 4.0 (openmoji and
its line drawings, sketch), MIT (fluent, and the names of emojibase-data).
"""

from __future__ import annotations

import csv
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from PIL import Image

from wmateacher.integrations.clip.data.pictograms import COLUMNS, PARTS, TABLE
from wmateacher.integrations.engine import command

__all__ = ["STYLES", "Pictogram", "Style", "build", "held_out", "select"]

SIZE = 48
_DRAWN_AT = 72
_LEAST = 8
_NO_PICTOGRAMS = {"symbols", "flags", "component"}  # groups of emojibase
_NO_KINDS = {"time"}


def _raster(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def _drawing(content: bytes) -> Image.Image:
    try:
        import cairosvg
    except (ImportError, OSError) as error:
        raise ImportError(
            f"drawings in SVG need CairoSVG and the library cairo ({error}): pip install cairosvg"
        ) from error
    return _raster(cairosvg.svg2png(bytestring=content, output_width=_DRAWN_AT, output_height=_DRAWN_AT))


@dataclass(frozen=True)
class Style:
    """The pictures of one hand in a package.

    Attributes:
        package: The name of the package's file, without its version.
        pattern: A regular expression for the names of its pictures, whose group is the code.
        read: Returns the image of a file's content.
    """

    package: str
    pattern: str
    read: Callable[[bytes], Image.Image] = _raster


STYLES = {
    "twemoji": Style("emoji-datasource-twitter", r"package/img/twitter/64/(.+)\.png"),
    "noto": Style("emoji-datasource-google", r"package/img/google/64/(.+)\.png"),
    "openmoji": Style("openmoji", r"package/color/svg/(.+)\.svg", _drawing),
    "sketch": Style("openmoji", r"package/black/svg/(.+)\.svg", _drawing),
    "fluent": Style("lobehub-fluent-emoji-3d", r"package/assets/(.+)\.webp"),
}
"""The styles by name."""
_NAMES = "emojibase-data"


@dataclass(frozen=True)
class Pictogram:
    """A pictogram.

    Attributes:
        code: Its code points in hexadecimal, joined by `-`.
        kind: Its kind in Unicode's order, such as `animal-bird`.
        name: Its name.
        keywords: Its keywords.
    """

    code: str
    kind: str
    name: str
    keywords: tuple[str, ...]


def _key(code: str) -> str:
    """Return a code without variation selectors, which packages write differently."""
    return code.lower().replace("-fe0f", "")


def _archive(packages: Path, name: str) -> tarfile.TarFile:
    found = sorted(f for f in packages.glob(f"{name}-*.tgz") if re.fullmatch(rf"{name}-\d[^/]*\.tgz", f.name))
    if len(found) != 1:
        raise FileNotFoundError(
            f"{len(found)} files {name}-VERSION.tgz in {packages}: fetch one version with `npm pack`"
        )
    return tarfile.open(found[0])


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo | str) -> bytes:
    file = archive.extractfile(member)
    assert file is not None
    return file.read()


def select(
    data: list[Mapping[str, Any]], groups: Mapping[str, Any], drawn: list[set[str]]
) -> list[Pictogram]:
    """Return the pictograms that all hands have drawn, of kinds with at least eight of them.

    Symbols, flags and clocks are left out, and variants in skin tone.

    Args:
        data: The content of emojibase's `data.json`.
        groups: The content of its `meta/groups.json`.
        drawn: For each style the codes that it has, without variation selectors.
    """
    found = []
    for entry in data:
        group, kind = (groups[of].get(str(entry.get(of[:-1]))) for of in ("groups", "subgroups"))
        left_out = group is None or kind is None or group in _NO_PICTOGRAMS or kind in _NO_KINDS
        if not left_out and all(_key(entry["hexcode"]) in codes for codes in drawn):
            tags = tuple(entry.get("tags", ()))
            found.append(Pictogram(entry["hexcode"].lower(), kind, entry["label"], tags))
    kinds = Counter(pictogram.kind for pictogram in found)
    return [pictogram for pictogram in found if kinds[pictogram.kind] >= _LEAST]


def held_out() -> dict[str, str]:
    """Return the part of every code that is not for training.

    The recorded results have this split. It keeps variants of one thing, such as the woman, the man and the
    person of a profession, in one part.
    """
    parts: dict[str, str] = {}
    part = ""
    for line in (Path(__file__).parent / "emoji_parts.txt").read_text(encoding="utf-8").splitlines():
        if line.endswith(":"):
            part = line.removesuffix(":")
        else:
            parts |= dict.fromkeys(map(_key, line.split()), part)
    return parts


def build(packages: Path, output: Path) -> list[Pictogram]:
    """Write the folder of pictograms.

    Args:
        packages: The folder with the five files of `npm pack`.
        output: The folder to write, which must not exist or be empty.

    Returns:
        The pictograms.

    Raises:
        FileNotFoundError: If a package is missing.
        FileExistsError: If the output is not empty.
    """
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"folder {output} is not empty: give a new one")
    with _archive(packages, _NAMES) as names:
        data, groups = (
            json.loads(_content(names, f"package/{n}")) for n in ("en/data.json", "meta/groups.json")
        )
    files: dict[str, dict[str, str]] = {}
    for name, style in STYLES.items():
        with _archive(packages, style.package) as archive:
            matches = (re.fullmatch(style.pattern, member) for member in archive.getnames())
            files[name] = {_key(m[1]): m[0] for m in matches if m is not None}
    pictograms = select(data, groups, [set(codes) for codes in files.values()])
    parts = held_out()
    part_of = {p.code: parts.get(_key(p.code), PARTS[0]) for p in pictograms}
    for name, style in STYLES.items():
        wanted = {files[name][_key(p.code)]: p for p in pictograms}
        with _archive(packages, style.package) as archive:
            # In the archive's order: going back in a compressed one means reading it again from its start.
            for member in archive:
                if member.name in wanted:
                    p = wanted[member.name]
                    file = output / part_of[p.code] / name / p.kind / f"{p.code}.png"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    _on_white(style.read(_content(archive, member))).save(file)
    with (output / TABLE).open("w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream, delimiter="\t", quoting=csv.QUOTE_NONE, lineterminator="\n")
        table.writerow(COLUMNS)
        rows = [(part_of[p.code], p.kind, p.code, p.name, "|".join(p.keywords)) for p in pictograms]
        table.writerows(sorted(rows))
    return pictograms


def _on_white(image: Image.Image) -> Image.Image:
    """Return a picture on white paper, reduced."""
    image = image.convert("RGBA")
    paper = Image.new("RGBA", image.size, "white")
    paper.alpha_composite(image)
    return paper.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def main(packages: Path, output: Path) -> None:
    """Build the folder of pictograms for the recipe `emoji` of examples/clip_tracer.py.

    Args:
        packages: The folder with the five files of `npm pack`.
        output: The folder to write.
    """
    pictograms = build(packages, output)
    kinds = len({pictogram.kind for pictogram in pictograms})
    print(f"wrote {len(pictograms)} pictograms of {kinds} kinds in {len(STYLES)} styles to {output}")


if __name__ == "__main__":
    command.run(lambda: tyro.cli(main, description=__doc__))
