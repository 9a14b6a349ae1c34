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

__all__ = ["IGNORED", "check_labels", "check_values", "find_pairs", "image_size", "read_class_names", "read_label"]

IGNORED = 255
"""Label of the pixels that count neither in the loss nor in the evaluation."""
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)
"""The EXIF tag of a camera's orientation, and its values that swap height and width."""

logger = logging.getLogger("acam_kd")
Array = np.ndarray[Any, Any]


def read_class_names(classes: str, *, hint: str) -> list[str]:
    """Read the names of the classes, in the order of the labels' numbers.

    Args:
        classes: names with commas between them, or a text file with one name per line.
        hint: ends messages: the option or key to mend.

    Raises:
        FileNotFoundError: no such file.
        ValueError: there are none, too many, or two are the same.
    """
    path = os.path.expanduser(classes)
    if os.path.isfile(path):
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            names = file.read().strip().splitlines()
    elif os.sep in classes or classes.endswith(".txt"):
        raise FileNotFoundError(f"no file of class names {os.path.abspath(path)} {hint}")
    else:
        names = classes.split(",")
    names = [name.strip() for name in names]
    if not all(names) or len(set(names)) < len(names) or not 1 <= len(names) <= IGNORED:
        raise ValueError(
            f"classes have to be 1 to {IGNORED} different names, with commas between them or one per line of a file; "
            f"found {len(names)}: {', '.join(map(repr, names[:20]))} {hint}"
        )
    return names


def find_pairs(image_root: str, label_root: str, *, name: str, hint: str = "") -> list[tuple[str, str]]:
    """Match every image with the label PNG of the same relative path and stem; other labels are left out.

    Args:
        image_root: folder of the images, at any depth.
        label_root: folder of the labels.
        name: the dataset's, for messages.
        hint: ends messages that an option or key can mend.

    Returns:
        (image, label) each, ordered by path.

    Raises:
        FileNotFoundError: a folder does not exist, or an image has no label.
        ValueError: there are no images, or the two folders are one.
    """
    hint = f" {hint}" if hint else ""
    for folder in (image_root, label_root):
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"{name}: no folder {os.path.abspath(folder)}{hint}")
    if os.path.samefile(image_root, label_root):  # every PNG there would be its own label
        raise ValueError(f"{name}: images and labels are in one folder, {os.path.abspath(image_root)}; two are needed")
    images = _files(image_root, IMAGES)
    if not images:
        raise ValueError(f"{name}: no images in {os.path.abspath(image_root)} (looked for {' '.join(IMAGES)}){hint}")
    labels = set(_files(label_root, (".png",)))
    pairs = [(image, image.with_suffix(".png")) for image in images]
    missing = [pair for pair in pairs if pair[1] not in labels]
    if missing:
        image, label = missing[0]
        raise FileNotFoundError(
            f"{name}: {len(missing)} of {len(images)} images have no label: {image} would need "
            f"{os.path.join(os.path.abspath(label_root), label)}{hint}"
        )
    return [(os.path.join(image_root, image), os.path.join(label_root, label)) for image, label in pairs]


def _files(root: str, suffixes: tuple[str, ...]) -> list[Path]:
    """Paths below ``root``, relative to it, without hidden files; links to folders are followed."""
    found = [Path(folder, name) for folder, _, names in os.walk(root, followlinks=True) for name in names]
    return sorted(p.relative_to(root) for p in found if p.suffix.lower() in suffixes and p.name[0] != ".")


def image_size(path: str) -> tuple[int, int]:
    """Height and width of an image as loaders see it, that is turned by its EXIF orientation; reads the header only.

    Raises:
        ValueError: not a readable image.
    """
    try:
        with Image.open(path) as image:
            # Without EXIF in the header, getexif would decode a whole PNG to look for some at its end.
            turned = "exif" in image.info and image.getexif().get(ORIENTATION) in TURNED
            return (image.width, image.height) if turned else (image.height, image.width)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"image {os.path.abspath(path)} cannot be read: {error}") from error


def read_label(path: str) -> Array:
    """Read a label image.

    Returns:
        (H, W), uint8: class numbers. Of a palette image the indices, which ``convert("L")`` would turn into greys.

    Raises:
        ValueError: not a readable image, or not one of class numbers.
    """
    with _open_label(path) as label:
        return np.array(label)


def _open_label(path: str) -> Image.Image:
    try:
        label = Image.open(path)
        scaled = label.mode == "L" and any(tile[3] in ("L;2", "L;4") for tile in label.tile)
        label.load()
    except (OSError, SyntaxError) as error:
        raise ValueError(f"label {os.path.abspath(path)} cannot be read: {error}") from error
    if scaled:  # to 0 .. 255, by PIL
        raise ValueError(f"label {os.path.abspath(path)} has grey values of 2 or 4 bits; save it with 8 bits")
    if label.mode not in ("L", "P"):
        raise ValueError(
            f"label {os.path.abspath(path)} has mode {label.mode}; labels have to be class numbers in one channel of "
            "8 bits (mode L or P), not colours"
        )
    return label


def check_labels(
    pairs: Sequence[tuple[str, str]],
    classes: Sequence[str],
    *,
    ignored: int = IGNORED,
    name: str,
    hint: str = "",
) -> list[int]:
    """Look at every label before a run starts, and warn of those that teach nothing and of classes without pixels.

    Args:
        pairs: (image, label) each.
        classes: the names of class 0, 1, ...
        ignored: the one other value that a label may have.
        name: the dataset's, for messages.
        hint: ends messages that an option or key can mend.

    Returns:
        The number of pixels of each class.

    Raises:
        ValueError: a file cannot be read, image and label differ in size, a label is not of one channel or has other
            values, or there is nothing but ignored pixels.
    """
    hint = f" {hint}" if hint else ""

    def look(pair: tuple[str, str]) -> Array:
        try:
            return _histogram(*pair, len(classes), ignored)
        except ValueError as error:
            raise ValueError(f"{name}: {error}{hint}") from error

    with ThreadPoolExecutor() as pool:  # PIL decodes without holding the interpreter's lock
        histograms = np.stack(list(pool.map(look, pairs)))[:, : len(classes)]
    counts: list[int] = histograms.sum(0).tolist()
    if not any(counts):
        raise ValueError(f"{name}: all pixels of all {len(pairs)} labels are {ignored}, which is ignored{hint}")
    empty = np.flatnonzero(histograms.sum(1) == 0)
    if len(empty):
        first = pairs[empty[0]][1]
        logger.warning(f"{name}: {len(empty)} of {len(pairs)} labels are ignored as a whole, the first is {first}")
    absent = [f"{each} ({number})" for number, each in enumerate(classes) if not counts[number]]
    if absent:
        logger.warning(f"{name}: no pixel of {', '.join(absent)} in {len(pairs)} labels")
    return counts


def _histogram(image: str, label: str, num_classes: int, ignored: int) -> Array:
    """(256,): how many pixels of a label have which value."""
    height, width = image_size(image)
    with _open_label(label) as pixels:
        if (pixels.height, pixels.width) != (height, width):
            raise ValueError(
                f"label {os.path.abspath(label)} is {pixels.width} x {pixels.height}, its image {width} x {height}"
            )
        histogram = np.array(pixels.histogram())
    check_values(histogram, label, num_classes, ignored)
    return histogram


def check_values(histogram: Array, label: str, num_classes: int, ignored: int) -> None:
    """Raise ValueError if a label has values that are neither classes nor ignored.

    Args:
        histogram: (256,); how many pixels have which value.
        label: the file, for messages.
        num_classes: values from 0 to below this are classes.
        ignored: the other value allowed.
    """
    wrong = [value for value in np.flatnonzero(histogram).tolist() if value >= num_classes and value != ignored]
    if wrong:
        shown = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
        raise ValueError(
            f"label {os.path.abspath(label)} has the values {shown}; allowed are 0 to {num_classes - 1} for the "
            f"{num_classes} classes, and {ignored} for what is ignored"
        )
