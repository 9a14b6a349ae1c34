"""Semantic segmentation as pairs of files: images, and label PNGs whose pixels are class numbers."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..core.errors import ConfigError

__all__ = [
    "IGNORED",
    "check_labels",
    "check_values",
    "find_pairs",
    "image_size",
    "read_class_names",
    "read_label",
    "read_names",
]

IGNORED = 255
"""The label of pixels that count neither in the loss nor in the evaluation."""
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)
"""The EXIF tag of a camera's orientation, and its values that swap height and width."""

FORM = "with commas between them, or one per line of a text file"

logger = logging.getLogger("acam_kd")
Array = np.ndarray[Any, Any]


def read_class_names(classes: str) -> list[str]:
    """Read the names of the classes, in the order of the labels' numbers.

    Args:
        classes: names with commas between them, or a text file with one name per line.

    Raises:
        ConfigError: there is no such file, there are no names or too many, or two are the same.
    """
    names = read_names(classes, "classes")
    if not all(names) or len(set(names)) < len(names) or not 1 <= len(names) <= IGNORED:
        listed = ", ".join(map(repr, names[:20]))
        raise ConfigError("classes", f"{len(names)} ({listed})", allowed=f"1 to {IGNORED} different names, {FORM}")
    return names


def read_names(text: str, argument: str) -> list[str]:
    """Read names of classes as they are.

    Args:
        text: names with commas between them, or a text file with one name per line.
        argument: the name of the argument, for messages.

    Raises:
        ConfigError: there is no such file.
    """
    path = os.path.expanduser(text)
    if os.path.isfile(path):
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            names = file.read().strip().splitlines()
    elif os.sep in text or text.endswith(".txt"):
        raise ConfigError(argument, f"no file {os.path.abspath(path)}", allowed=f"names {FORM}")
    else:
        names = text.split(",")
    return [name.strip() for name in names]


def find_pairs(
    image_root: str,
    label_root: str,
    *,
    name: str,
) -> list[tuple[str, str]]:
    """Match every image with the label PNG of the same relative path and stem; leave other labels out.

    Args:
        image_root: the folder of the images, which may lie at any depth below it.
        label_root: the folder of the labels.
        name: the dataset's name in messages.

    Returns:
        (image, label) each, ordered by path.

    Raises:
        ConfigError: a folder does not exist, there are no images, an image has no label, or the two folders are one.
    """
    for folder in (image_root, label_root):
        if not os.path.isdir(folder):
            raise ConfigError(
                "dataset",
                f"{name}: no folder {os.path.abspath(folder)}",
                allowed="a folder of images and one of labels",
            )
    if os.path.samefile(image_root, label_root):  # every PNG there would be its own label
        raise ConfigError(
            "dataset", f"{name}: images and labels in one folder, {os.path.abspath(image_root)}", allowed="two folders"
        )
    images = _files(image_root, IMAGES)
    if not images:
        raise ConfigError(
            "dataset", f"{name}: no images in {os.path.abspath(image_root)}", allowed=f"files named {' '.join(IMAGES)}"
        )
    labels = set(_files(label_root, (".png",)))
    pairs = [(image, image.with_suffix(".png")) for image in images]
    missing = [pair for pair in pairs if pair[1] not in labels]
    if missing:
        image, label = missing[0]
        raise ConfigError(
            "dataset",
            f"{name}: {len(missing)} of {len(images)} images without a label, the first is {image}",
            allowed=f"its label at {os.path.join(os.path.abspath(label_root), label)}",
        )
    return [(os.path.join(image_root, image), os.path.join(label_root, label)) for image, label in pairs]


def _files(root: str, suffixes: tuple[str, ...]) -> list[Path]:
    """List the files below ``root``, relative to it, without hidden ones. Links to folders are followed."""
    paths = [Path(folder, name) for folder, _, names in os.walk(root, followlinks=True) for name in names]
    return sorted(p.relative_to(root) for p in paths if p.suffix.lower() in suffixes and p.name[0] != ".")


def image_size(path: str) -> tuple[int, int]:
    """Return height and width of an image as loaders see it, turned by its EXIF orientation.

    Only the header of the file is read.

    Raises:
        ConfigError: the file is not a readable image.
    """
    try:
        with Image.open(path) as image:
            # Without EXIF in the header, getexif would decode a whole PNG to look for some at its end.
            turned = "exif" in image.info and image.getexif().get(ORIENTATION) in TURNED
            return (image.width, image.height) if turned else (image.height, image.width)
    except (OSError, SyntaxError) as error:
        raise ConfigError(
            "image", f"{os.path.abspath(path)}, which cannot be read ({error})", allowed="a whole image file"
        ) from error


def read_label(path: str) -> Array:
    """Read a label image.

    Returns:
        (H, W), uint8: class numbers. A palette image gives its indices, which ``convert("L")`` would turn into
        greys.

    Raises:
        ConfigError: the file is not a readable image, or its pixels are not class numbers.
    """
    with _open_label(path) as label:
        return np.array(label)


def _open_label(path: str) -> Image.Image:
    try:
        label = Image.open(path)
        scaled = label.mode == "L" and any(tile[3] in ("L;2", "L;4") for tile in label.tile)
        label.load()
    except (OSError, SyntaxError) as error:
        raise ConfigError(
            "label", f"{os.path.abspath(path)}, which cannot be read ({error})", allowed="a whole PNG file"
        ) from error
    if scaled:  # PIL stretches such values to 0 .. 255
        raise ConfigError(
            "label",
            f"{os.path.abspath(path)} with grey values of 2 or 4 bits",
            allowed="8 bits",
            hint="save it with 8 bits",
        )
    if label.mode not in ("L", "P"):
        raise ConfigError(
            "label",
            f"{os.path.abspath(path)} with mode {label.mode}",
            allowed="class numbers in one channel of 8 bits (mode L or P), not colours",
        )
    return label


def check_labels(
    pairs: Sequence[tuple[str, str]],
    classes: Sequence[str],
    *,
    ignored: int = IGNORED,
    name: str,
) -> list[int]:
    """Check every label before a run starts.

    Labels without a pixel that counts, and classes without a pixel, are warnings.

    Args:
        pairs: (image, label) each.
        classes: the names of class 0, 1, ...
        ignored: the one other value that a label may have.
        name: the dataset's name in messages.

    Returns:
        The number of pixels of each class.

    Raises:
        ConfigError: a file cannot be read, or image and label differ in size. Or a label has several channels or
            wrong values, or all pixels of all labels are ignored.
    """

    def look(pair: tuple[str, str]) -> Array:
        try:
            return _histogram(*pair, len(classes), ignored)
        except ConfigError as error:
            value = f"{name}: {error.argument} {error.value}"
            raise ConfigError("dataset", value, error.allowed, error.hint) from error

    with ThreadPoolExecutor() as pool:  # PIL decodes without holding the interpreter's lock
        histograms = np.stack(list(pool.map(look, pairs)))[:, : len(classes)]
    counts: list[int] = histograms.sum(0).tolist()
    if not any(counts):
        raise ConfigError(
            "dataset",
            f"{name}: {len(pairs)} labels whose pixels are all {ignored}, which is ignored",
            allowed="pixels of a class",
        )
    empty = np.flatnonzero(histograms.sum(1) == 0)
    if len(empty):
        first = pairs[empty[0]][1]
        logger.warning(f"{name}: {len(empty)} of {len(pairs)} labels are ignored as a whole, the first is {first}")
    absent = [f"{each} ({number})" for number, each in enumerate(classes) if not counts[number]]
    if absent:
        logger.warning(f"{name}: no pixel of {', '.join(absent)} in {len(pairs)} labels")
    return counts


def _histogram(image: str, label: str, num_classes: int, ignored: int) -> Array:
    """Count the pixels of a label by their value: (256,)."""
    height, width = image_size(image)
    with _open_label(label) as pixels:
        if (pixels.height, pixels.width) != (height, width):
            raise ConfigError(
                "label",
                f"{os.path.abspath(label)} with {pixels.width} x {pixels.height} pixels",
                allowed=f"{width} x {height}, as its image",
            )
        histogram = np.array(pixels.histogram())
    check_values(histogram, label, num_classes, ignored)
    return histogram


def check_values(histogram: Array, label: str, num_classes: int, ignored: int) -> None:
    """Refuse a label whose values are neither classes nor ignored.

    Args:
        histogram: (256,), the number of pixels of each value.
        label: the file, for messages.
        num_classes: values from 0 to below this are classes.
        ignored: the other value allowed.

    Raises:
        ConfigError: there is another value.
    """
    wrong = [value for value in np.flatnonzero(histogram).tolist() if value >= num_classes and value != ignored]
    if wrong:
        shown = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
        raise ConfigError(
            "label",
            f"{os.path.abspath(label)} with the values {shown}",
            allowed=f"0 to {num_classes - 1} for the {num_classes} classes, and {ignored} for ignored pixels",
            hint="correct the label, or name its classes in {classes}",
        )
