"""A folder of pictograms that are drawn here: coloured shapes, in one hand filled and in the others as lines."""

from pathlib import Path

from PIL import Image, ImageDraw

CLASSES = {"shape-round": "ellipse", "shape-square": "rectangle"}
COLOURS = ("red", "green", "blue", "black")
STYLES = ("twemoji", "noto", "openmoji", "sketch", "fluent")
PARTS = {"train": COLOURS, "validation": ("orange",), "test": ("purple", "brown")}


def write(root: Path, size: int = 16) -> Path:
    lines = ["part\tclass\tcode\tname\tkeywords"]
    for part, colours in PARTS.items():
        for kind, shape in CLASSES.items():
            for colour in colours:
                code = f"{colour}-{shape}"
                lines.append(f"{part}\t{kind}\t{code}\t{colour} {shape}\t{colour}|{kind.split('-')[1]}")
                for number, style in enumerate(STYLES):
                    file = root / part / style / kind / f"{code}.png"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    image = Image.new("RGB", (size, size), "white")
                    box = (1 + number % 2, 2, size - 3, size - 4)
                    paint = {"outline" if number else "fill": colour}
                    getattr(ImageDraw.Draw(image), shape)(box, **paint)
                    image.save(file)
    (root / "pictograms.tsv").write_text("\n".join(lines) + "\n")
    return root
