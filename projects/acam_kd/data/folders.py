"""Datasets for image classification: one folder of images for each class, or a table of paths and classes."""

from __future__ import annotations

import csv
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError
from .division import Division, choose
from .images import AUTO

__all__ = ["ClassSplit", "Labelled", "divide_classes", "find_classes", "list_images"]

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test"), "all": ("",)}
COLUMNS = ("path", "class")

logger = logging.getLogger("acam_kd")


@dataclass(frozen=True)
class ClassSplit:
    """One split of a classification dataset.

    Args:
        image_root: a folder with a folder of images for each class; or a CSV file with the columns path and class,
            whose paths begin at its own folder.
        data: the dataset's folder or file, as it was given.
        part: ``"train"`` or ``"val"`` of a dataset that is divided; empty for all images.
        val_fraction, split_seed, group_by: see ``Division``.
        image_range: see ``images.RANGES``.
    """

    image_root: str
    data: str
    part: str = ""
    val_fraction: float = 0.0
    split_seed: int = 0
    group_by: str = ""
    image_range: str = AUTO

    def as_options(self) -> dict[str, Any]:
        """Return the command's options that give this split."""
        found: dict[str, Any] = {"data": self.data, "image-range": self.image_range}
        if self.part:
            found |= {"val-fraction": self.val_fraction, "split-seed": self.split_seed, "group-by": self.group_by}
        return {name: value for name, value in found.items() if value or name == "split-seed"}


@dataclass(frozen=True)
class Labelled:
    """Images and their classes.

    Args:
        classes: their names, sorted; number k is the k-th.
        files: the paths of the images.
        labels: for each image the number of its class.
    """

    classes: tuple[str, ...]
    files: tuple[str, ...]
    labels: tuple[int, ...]


def find_classes(data: Path, split: str) -> ClassSplit | None:
    """Find ``"train"``, ``"val"`` or ``"all"`` of a classification dataset; None if it is another kind of dataset.

    A folder counts if two or more of its folders have images in them. For ``"all"`` the dataset itself is looked at.
    """
    if data.is_file():
        return ClassSplit(str(data), str(data)) if split == "all" and data.suffix.lower() == ".csv" else None
    for name in NAMES[split]:
        if name and (data / f"{name}.csv").is_file():
            return ClassSplit(str(data / f"{name}.csv"), str(data))
        if len(_class_folders(data / name)) > 1:
            return ClassSplit(str(data / name), str(data))
    return None


def divide_classes(whole: ClassSplit, division: Division) -> dict[str, ClassSplit]:
    """Divide a dataset into images to train on and to validate on; every class with two images is in both parts."""
    if not 0 < division.val_fraction < 1:
        raise ConfigError("val_fraction", division.val_fraction, "between 0 and 1")
    how = (division.val_fraction, division.split_seed, division.group_by)
    return {
        part: replace(whole, part=part, val_fraction=how[0], split_seed=how[1], group_by=how[2])
        for part in ("train", "val")
    }


def list_images(split: ClassSplit, *, name: str = "dataset") -> Labelled:
    """List the images of a split in a fixed order.

    Args:
        split: the files.
        name: the dataset's name in messages.

    Raises:
        ConfigError: there are fewer than two classes, a class without images, or a broken table.
    """
    root = Path(split.image_root)
    pairs = _of_table(root, name) if root.is_file() else _of_folders(root, name)
    classes = tuple(sorted({cls for _, cls in pairs}))
    if len(classes) < 2:
        raise ConfigError("dataset", f"{name}: {len(classes)} classes in {root}", "2 classes or more")
    if split.part:
        base = root.parent if root.is_file() else root
        chosen = _chosen(split, [(os.path.relpath(path, base), cls) for path, cls in pairs])
        pairs = [pair for number, pair in enumerate(pairs) if (number in chosen) == (split.part == "val")]
        if missing := {*classes} - {cls for _, cls in pairs}:
            logger.warning("%s: no image of %s, which have too few images", name, ", ".join(sorted(missing)))
    number_of = {cls: number for number, cls in enumerate(classes)}
    return Labelled(classes, tuple(path for path, _ in pairs), tuple(number_of[cls] for _, cls in pairs))


def _class_folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return [folder for folder in sorted(root.iterdir()) if folder.is_dir() and _images(folder, first=True)]


def _images(folder: Path, *, first: bool = False) -> list[str]:
    """List the images of a folder and of the folders in it, sorted; the first one alone if that is enough."""
    found = []
    for path, folders, files in os.walk(folder):
        folders.sort()
        for file in sorted(files):
            if file.lower().endswith(SUFFIXES) and not file.startswith("."):
                found.append(os.path.join(path, file))
                if first:
                    return found
    return found


def _of_folders(root: Path, name: str) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")):
        images = _images(folder)
        if not images:
            raise ConfigError("dataset", f"{name}: {folder} without images", "images in the folder of each class")
        pairs += [(image, folder.name) for image in images]
    return pairs


def _of_table(file: Path, name: str) -> list[tuple[str, str]]:
    columns = f"a CSV file with the columns {' and '.join(COLUMNS)}"
    try:
        with open(file, newline="", encoding="utf-8-sig") as opened:
            rows = list(csv.DictReader(opened))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError("dataset", f"{name}: {file}, which cannot be read ({error})", columns) from error
    pairs = []
    for number, row in enumerate(rows, 2):
        path, cls = (str(row.get(column) or "").strip() for column in COLUMNS)
        if not path or not cls:
            raise ConfigError("dataset", f"{name}: line {number} of {file} without path or class", columns)
        full = file.parent / path
        if not full.is_file():
            raise ConfigError("dataset", f"{name}: line {number} of {file} with {full}", "a path of an image file")
        pairs.append((str(full), cls))
    if not pairs:
        raise ConfigError("dataset", f"{name}: no line in {file}", columns)
    return pairs


def _chosen(split: ClassSplit, pairs: Sequence[tuple[str, str]]) -> set[int]:
    """Return the numbers of the images to validate on, class by class, so that every class has its fraction."""
    division = Division(split.val_fraction, split.split_seed, split.group_by)
    groups = [division.group(Path(path).as_posix()) for path, _ in pairs]
    if split.group_by:
        sizes, classes = Counter(groups), {group: set[str]() for group in groups}
        for group, (_, cls) in zip(groups, pairs):
            classes[group].add(cls)
        if len(sizes) < 2:
            raise ConfigError("group_by", f"{len(sizes)} group of images in {split.image_root}", "at least 2")
        chosen = choose(sizes, classes, division)
    else:
        chosen = set()
        for cls in {cls for _, cls in pairs}:
            mine = Counter(group for group, (_, other) in zip(groups, pairs) if other == cls)
            if len(mine) > 1:
                chosen |= choose(mine, {group: set() for group in mine}, division)
    return {number for number, group in enumerate(groups) if group in chosen}
