"""The places of a dataset's files: in COCO format, or images and label PNGs."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from ..core.errors import ConfigError
from .coco import NAMES, CocoSplit, find_split
from .images import AUTO
from .labels import read_class_names

__all__ = ["LabelSplit", "Split", "find_any_split", "named_split", "read_classes"]

CLASSES_FILE = "classes.txt"


@dataclass(frozen=True)
class LabelSplit:
    """One split of a segmentation dataset: its images, the label PNGs of the same names, the names of the classes."""

    image_root: str
    label_root: str
    classes: tuple[str, ...]
    """The names of class 0, 1, ..."""
    image_range: str = AUTO
    """The range of grey values of more than 8 bits: see ``images.RANGES``."""


Split = CocoSplit | LabelSplit


def find_any_split(folder: str | Path, split: str, classes: str = "", image_range: str = AUTO) -> Split:
    """Find ``"train"`` or ``"val"`` in a dataset's folder.

    ``train/images`` and ``train/labels`` make a segmentation dataset. Its classes are in ``classes.txt`` unless they
    are given. All other datasets have to be in COCO format.

    Args:
        folder: the folder of the dataset.
        split: the name of the split.
        classes: see ``read_classes``.
        image_range: see ``images.RANGES``.

    Raises:
        ConfigError: no known layout is there, label PNGs have no names of classes, or names are given for a COCO json.
    """
    folder = Path(folder).expanduser()
    for name in NAMES[split]:
        images, labels = folder / name / "images", folder / name / "labels"
        if images.is_dir() and labels.is_dir():
            file = folder / CLASSES_FILE
            names = read_classes(classes or (str(file) if file.is_file() else ""))
            return LabelSplit(str(images), str(labels), names, image_range)
    return replace(_without_classes(_find_coco(folder, split), classes), image_range=image_range)


def _find_coco(folder: Path, split: str) -> CocoSplit:
    try:
        return find_split(folder, split)
    except ConfigError as error:
        if not folder.is_dir():
            raise
        allowed = f"{error.allowed}, or {split}/images + {split}/labels with label PNGs"
        raise ConfigError(error.argument, error.value, allowed, error.hint) from None


def named_split(first: str, second: str, classes: str = "", image_range: str = AUTO) -> Split:
    """Make a split of its parts: a json and its images, or, if the first is a folder, images and labels.

    Raises:
        ConfigError: label PNGs have no names of classes, or names are given for a COCO json.
    """
    first, second = os.path.expanduser(first), os.path.expanduser(second)
    if os.path.isdir(first):
        return LabelSplit(first, second, read_classes(classes), image_range)
    return _without_classes(CocoSplit(first, second, image_range), classes)


def _without_classes(split: CocoSplit, classes: str) -> CocoSplit:
    if classes:
        raise ConfigError(
            "classes",
            f"{classes} beside {split.json_file}",
            allowed="none, because a json names its categories itself",
            hint="{classes} is for label PNGs",
        )
    return split


def read_classes(classes: str) -> tuple[str, ...]:
    """Read the names of the classes, given with commas between them or as a file; see ``read_class_names``.

    Raises:
        ConfigError: there are none, or they cannot be used.
    """
    if not classes:
        raise ConfigError(
            "classes",
            "no names for the numbers in the labels",
            allowed="names with commas between them, or a file with one per line",
            hint=f"give {{classes}}, or put {CLASSES_FILE} into the folder {{data}}",
        )
    return tuple(read_class_names(classes))
