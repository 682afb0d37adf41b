"""Images in files of any kind, read in RGB."""

from __future__ import annotations

from contextlib import suppress
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps

__all__ = ["SUFFIXES", "read_image"]

SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm",
    ".pbm", ".pnm", ".jp2", ".avif", ".tga",
)  # fmt: skip
"""The suffixes of image files, in any case."""


def read_image(file: str | BytesIO) -> Image.Image:
    """Read an image in RGB, as a viewer shows it.

    It is turned as its EXIF data says, transparent parts are white, 16 bits become 8, and of an animation the
    first picture is taken.

    Raises:
        OSError: If the image cannot be read, whichever error its decoder raised.
    """
    try:
        with Image.open(file) as image:
            image.load()
            with suppress(Exception):  # the pixels of an image with damaged EXIF data are good
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith(("I", "F")):
                return _from_wide(image)
            if not image.has_transparency_data:
                return image.convert("RGB")
            white = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # decoders raise many kinds, decompression bombs among them
        raise OSError(f"{file} cannot be read as an image ({error})") from error


def _from_wide(image: Image.Image) -> Image.Image:
    """Return an image of 16 bits per pixel with 8, where Pillow's conversion would clip."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 0xFFFF:
        raise OSError(f"its values are not in 0 ... 65,535 (mode {image.mode}): save it with 8 or 16 bits")
    return Image.fromarray((values // 256).astype(np.uint8)).convert("RGB")


def __dir__() -> list[str]:
    return __all__
