"""Where a dataset's files are: in COCO format, or images and label PNGs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from .coco import NAMES, CocoSplit, find_split
from .labels import read_class_names

__all__ = ["LabelSplit", "Split", "find_any_split", "named_split", "read_classes"]

CLASSES_FILE = "classes.txt"
KEY = "(option: --classes)"


@dataclass(frozen=True)
class LabelSplit:
    """One split of a segmentation dataset: its images, the label PNGs of the same names, what its numbers mean."""

    image_root: str
    label_root: str
    classes: tuple[str, ...]
    """The names of class 0, 1, ..."""


Split = CocoSplit | LabelSplit


def find_any_split(folder: str | Path, split: str, classes: str = "") -> Split:
    """Find ``"train"`` or ``"val"`` in a dataset's folder.

    ``train/images`` and ``train/labels`` make a segmentation dataset, whose classes are in ``classes.txt`` if they are
    not given; else it has to be in COCO format.

    Args:
        folder: of the dataset.
        split: its name.
        classes: see ``read_classes``.

    Raises:
        FileNotFoundError: no known layout is there.
        ValueError: the classes have no names, or names are given for COCO's.
    """
    folder = Path(folder).expanduser()
    for name in NAMES[split]:
        images, labels = folder / name / "images", folder / name / "labels"
        if images.is_dir() and labels.is_dir():
            file = folder / CLASSES_FILE
            return LabelSplit(str(images), str(labels), read_classes(classes or (str(file) if file.is_file() else "")))
    return _without_classes(_find_coco(folder, split), classes)


def _find_coco(folder: Path, split: str) -> CocoSplit:
    try:
        return find_split(folder, split)
    except FileNotFoundError as error:
        if not folder.is_dir():
            raise
        raise FileNotFoundError(f"{error}; and {split}/images + {split}/labels with label PNGs") from None


def named_split(first: str, second: str, classes: str = "") -> Split:
    """A split by its parts: a json and its images, or, if the first is a folder, images and labels.

    Raises:
        ValueError: as ``find_any_split``.
    """
    first, second = os.path.expanduser(first), os.path.expanduser(second)
    if os.path.isdir(first):
        return LabelSplit(first, second, read_classes(classes))
    return _without_classes(CocoSplit(first, second), classes)


def _without_classes(split: CocoSplit, classes: str) -> CocoSplit:
    if classes:
        raise ValueError(f"{split.json_file} names its categories itself; classes are for label PNGs {KEY}")
    return split


def read_classes(classes: str) -> tuple[str, ...]:
    """The names of the classes: with commas between them, or a file; see ``read_class_names``.

    Raises:
        FileNotFoundError, ValueError: there are none, or they cannot be used.
    """
    if not classes:
        raise ValueError(
            "the numbers in the labels have no names: give them with commas between them, or a file with one per line, "
            f"or put {CLASSES_FILE} into the folder of --data {KEY}"
        )
    return tuple(read_class_names(classes, hint=KEY))
