"""Semantic segmentation as pairs of files: images, and label PNGs whose pixels are class numbers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..core.errors import ConfigError
from .images import opened

__all__ = ["IGNORED", "check_values", "find_pairs", "open_label", "read_class_names", "read_label", "read_names"]

IGNORED = 255
"""The label of pixels that count neither in the loss nor in the evaluation."""
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")

FORM = "with commas between them, or one per line of a text file"

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
        text: names with commas between them, or lines of one name each, or a text file with such lines.
        argument: the name of the argument, for messages.

    Raises:
        ConfigError: there is no such file.
    """
    path = os.path.expanduser(text)
    if "\n" in text:
        names = text.strip().splitlines()
    elif os.path.isfile(path):
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


def read_label(path: str) -> Array:
    """Read a label image.

    Returns:
        (H, W), uint8: class numbers. A palette image gives its indices, which ``convert("L")`` would turn into
        greys.

    Raises:
        ConfigError: the file is not a readable image, or its pixels are not class numbers.
    """
    with open_label(path) as label:
        return np.array(label)


@contextmanager
def open_label(path: str) -> Iterator[Image.Image]:
    """Open and decode a label image: class numbers of 8 bits.

    Raises:
        ConfigError: see ``read_label``.
    """
    where = os.path.abspath(path)
    with opened(path, "label", "a whole PNG file") as label:
        scaled = label.mode == "L" and any(tile[3] in ("L;2", "L;4") for tile in getattr(label, "tile", ()))
        label.load()
        if scaled:  # PIL stretches such values to 0 .. 255
            raise ConfigError(
                "label", f"{where} with grey values of 2 or 4 bits", allowed="8 bits", hint="save it with 8 bits"
            )
        if label.mode not in ("L", "P"):
            allowed = "class numbers in one channel of 8 bits (mode L or P), not colours"
            raise ConfigError("label", f"{where} with mode {label.mode}", allowed=allowed)
        yield label


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
