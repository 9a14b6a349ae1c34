"""Image files: the one function that reads pixels for torchvision's engine, and a look at a header for the checks."""

from __future__ import annotations

import contextlib
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from ..core.errors import ConfigError, first_line

__all__ = ["AUTO", "RANGES", "SIDEWAYS", "Header", "image_size", "look", "opened", "read_rgb"]

Array = np.ndarray[Any, Any]

AUTO = "auto"
RANGES = {AUTO: 0.0, "8bit": 255.0, "16bit": 65535.0, "0-1": 1.0}
"""The choices for grey images of more than 8 bits -> the value that becomes white. ``auto`` takes 16 bits as 16bit."""
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Value of the EXIF tag of a camera's orientation -> what shows the image upright."""
SIDEWAYS = (5, 6, 7, 8)
DEEP = "colour of 16 bits"
"""The kind of images of which Pillow itself reads the upper 8 bits."""


@dataclass(frozen=True)
class Header:
    """The facts of an image file that decide how it is read.

    Args:
        width, height: in pixels, upright as the reader returns it.
        mode: Pillow's name of the pixels' kind.
        depth: ``"16 bits"``, ``"32 bits"``, ``"floating point"`` or ``DEEP``; empty for 8 bits and less.
        orientation: the value of the EXIF tag, 1 for none.
        format: Pillow's name of the file format.
        low, high: the smallest and the largest value, for files with a ``depth``; NaN if a value is not finite.
        problem: the reason why the file cannot be read; empty if it can.
    """

    width: int = 0
    height: int = 0
    mode: str = ""
    depth: str = ""
    orientation: int = 1
    format: str = ""
    low: float = 0.0
    high: float = 0.0
    problem: str = ""


def read_rgb(path: str, image_range: str = AUTO) -> Array:
    """Read an image as (H, W, 3), uint8, RGB, upright as its EXIF orientation says.

    Transparency is left out. Grey values of more than 8 bits are scaled: see ``RANGES``.

    Raises:
        ConfigError: the file is not a readable image, or its values do not fit the range.
    """
    with opened(path) as image:
        pixels = _upright(image)
        if _depth(image) in ("", DEEP):
            return np.array(pixels.convert("RGB"))
        grey = _scaled(np.asarray(pixels), _depth(image), image_range, path)
    return np.repeat(grey[:, :, None], 3, axis=2)


def image_size(path: str) -> tuple[int, int]:
    """Return height and width of an image as loaders see it, turned by its EXIF orientation.

    Only the header of the file is read, where that is enough.

    Raises:
        ConfigError: the file is not a readable image.
    """
    header = look(path)
    if header.problem:
        found = f"{os.path.abspath(path)}, which cannot be read ({header.problem})"
        raise ConfigError("image", found, allowed="a whole image file")
    return header.height, header.width


def look(path: str) -> Header:
    """Look at the header of an image file, and at its end; pixels are decoded only where these say too little.

    Nothing is raised: see ``Header.problem``.
    """
    try:
        with opened(path) as image:
            return _header(image)
    except ConfigError as error:
        return Header(problem=first_line(error.__cause__ or error))


@contextlib.contextmanager
def opened(path: str, argument: str = "image", allowed: str = "a whole image file") -> Iterator[Image.Image]:
    """Open an image file.

    Raises:
        ConfigError: something is wrong with it, be it inside of Pillow. ``argument`` and ``allowed`` are the error's.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            raise OSError("not a regular file")
        with Image.open(path) as image:
            yield image
    except ConfigError:
        raise
    except Exception as error:  # broken files make Pillow's readers fail in many ways, none of which is a bug here
        found = f"{os.path.abspath(path)}, which cannot be read ({first_line(error)})"
        raise ConfigError(argument, found, allowed) from error


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # a TIFF file turns itself here, and is not to be turned twice
    turn = TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # EXIF that cannot be read says nothing; Detectron2 takes it so too
        return 1


def _depth(image: Image.Image) -> str:
    if image.mode.startswith("I;16"):
        return "16 bits"
    if image.mode == "I":
        return "16 bits" if image.format == "PNG" else "32 bits"  # PNG has no more than 16
    if image.mode == "F":
        return "floating point"
    return DEEP if any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())) else ""


def _header(image: Image.Image) -> Header:
    mode, depth, file_format = image.mode, _depth(image), str(image.format)
    pixels: Image.Image | None = None
    if depth or not _ends(image):
        asked = _orientation(image) if file_format == "TIFF" else 1
        pixels = _upright(image)
        orientation = asked if file_format == "TIFF" else _orientation(image)
        width, height = pixels.size
    else:
        # PNG's own getexif would decode the image, to look behind it for EXIF that _ends has not found.
        orientation = _header_orientation(image)
        width, height = image.size[::-1] if orientation in SIDEWAYS else image.size
    low, high = _extremes(np.asarray(pixels), depth) if depth else (0.0, 0.0)
    return Header(width, height, mode, depth, orientation, file_format, low, high)


def _header_orientation(image: Image.Image) -> int:
    try:
        return int(Image.Image.getexif(image).get(ORIENTATION, 1))
    except Exception:
        return 1


def _extremes(pixels: Array, depth: str) -> tuple[float, float]:
    scale = 256 if depth == DEEP else 1  # Pillow has taken the lower 8 bits away
    low, high = float(pixels.min()) * scale, float(pixels.max()) * scale
    return (low, high) if np.isfinite([low, high]).all() else (float("nan"), float("nan"))


def _scaled(pixels: Array, depth: str, image_range: str, path: str) -> Array:
    """Scale grey values of more than 8 bits to uint8: 16 bits by their upper byte, the others by rounding."""
    if image_range == AUTO:
        if depth != "16 bits":
            raise ConfigError(
                "image_range", f"{AUTO} for {path} with {depth}", "the range of the values", "give {image_range}"
            )
        image_range = "16bit"
    low, high = _extremes(pixels, depth)
    white = RANGES[image_range]
    if not (low >= 0 and high <= white):
        found = f"{image_range} for {path} with values from {low:g} to {high:g}"
        raise ConfigError("image_range", found, f"values from 0 to {white:g}")
    if image_range == "16bit":
        return (pixels.astype(np.float64) // 256).astype(np.uint8)
    return (pixels.astype(np.float64) * (255 / white)).round().astype(np.uint8)


def _ends(image: Image.Image) -> bool:
    """Return True if the file is certain to have its end, and no orientation behind its pixels."""
    path = os.fspath(getattr(image, "filename", ""))
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if image.format == "PNG":
            return _png_ends(file, size)
        if image.format in ("JPEG", "MPO"):
            file.seek(max(0, size - 64))
            return file.read().rstrip(b"\0\r\n").endswith(b"\xff\xd9")
        if image.format == "WEBP":
            return size >= 8 + struct.unpack("<I", file.read(8)[4:])[0]
    return False


def _png_ends(file: BinaryIO, size: int) -> bool:
    """Walk over the chunks of a PNG file. Texts or EXIF behind the pixels may hold an orientation."""
    place, pixels = 8, False
    while place + 12 <= size:
        file.seek(place)
        length, kind = struct.unpack(">I4s", file.read(8))
        place += 12 + length
        if kind == b"IEND":
            return place <= size
        pixels = pixels or kind == b"IDAT"
        if pixels and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
            return False
    return False
