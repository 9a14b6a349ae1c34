"""Datasets in YOLO's format: a data.yaml, images, and a text file of boxes or polygons per image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import ConfigError
from .coco import NAMES
from .convert import FilePairs, Thing, files_below, has_files, refuse_strays
from .labels import read_class_names
from .yolo_file import Named, YoloFile, read_yolo_file

__all__ = ["YoloLabels", "find_yolo", "yolo_pairs"]

YAML_NAMES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
LAYOUTS = (("{split}/images", "{split}/labels"), ("images/{split}", "labels/{split}"))
"""The folders of images and labels of a split that no file names."""
WHOLE = (("images", "labels"),)
"""The same for a dataset without a split."""
SLACK = 0.01
"""Coordinates may be so far outside of the image, as a part of its size, because tools round them."""
FORM = "5 numbers (class, x, y, width, height), or 7, 9, ... (class and the corners of a polygon)"


@dataclass(frozen=True)
class YoloLabels:
    """A reader of YOLO's label files.

    Args:
        names: of the classes.
        keypoints: the number of values after each box that belong to keypoints, which are not read.
    """

    names: tuple[str, ...]
    keypoints: int = 0

    def read(self, path: Path, width: int, height: int) -> list[Thing]:
        """Read the objects of an image; see ``convert.Reader``.

        Raises:
            ConfigError: a line is no object; it names file and line.
        """
        lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        return [
            self._thing(f"{path}:{number}", line.split(), width, height)
            for number, line in enumerate(lines, 1)
            if line.strip()
        ]

    def _thing(self, where: str, words: Sequence[str], width: int, height: int) -> Thing:
        numbers = [_number(where, word) for word in words]
        if self.keypoints and len(numbers) == 5 + self.keypoints:
            numbers = numbers[:5]
        if len(numbers) != 5 and (len(numbers) < 7 or len(numbers) % 2 == 0):
            hint = "a confidence at the end has to go" if len(numbers) == 6 else ""
            raise ConfigError("dataset", f"{where}: {len(numbers)} numbers", FORM, hint)
        known = f"0 to {len(self.names) - 1}, the numbers of the {len(self.names)} class names"
        if not (numbers[0].is_integer() and 0 <= numbers[0] < len(self.names)):
            raise ConfigError("dataset", f"{where}: class {words[0]}", known)
        for word, value in zip(words[1:], numbers[1:]):
            if not -SLACK <= value <= 1 + SLACK:
                raise ConfigError(
                    "dataset", f"{where}: {word}", "parts of the image's width and height, from 0 to 1",
                    "pixels have to be divided by the size of the image",
                )  # fmt: skip
        if len(numbers) > 5:
            return _polygon(int(numbers[0]), numbers[1:], width, height)
        x, y, w, h = numbers[1:]
        if w < 0 or h < 0:
            raise ConfigError("dataset", f"{where}: a box of size {w:g} x {h:g}", "a size of 0 to 1")
        return Thing(int(numbers[0]), ((x - w / 2) * width, (y - h / 2) * height, w * width, h * height))


def _number(where: str, word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError("dataset", f"{where}: {word}, which is no finite number", FORM)
    return value


def _polygon(number: int, values: Sequence[float], width: int, height: int) -> Thing:
    xs = [min(max(value, 0.0), 1.0) * width for value in values[::2]]
    ys = [min(max(value, 0.0), 1.0) * height for value in values[1::2]]
    box = min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)
    return Thing(number, box, tuple(value for corner in zip(xs, ys) for value in corner))


def find_yolo(place: Path, split: str, classes: str = "") -> FilePairs | None:
    """Find a split of a dataset in YOLO's format.

    A ``data.yaml`` names images and classes. Without one there may be ``train/images`` and ``train/labels``, or
    ``images/train`` and ``labels/train``, with the classes in ``classes.txt`` or given.

    Args:
        place: the folder of the dataset, or its yaml file.
        split: ``"train"``, ``"val"``, or ``"all"`` for a dataset without a split.
        classes: see ``read_class_names``; only for a dataset without a yaml file.

    Returns:
        Images and label files. None if this is no such dataset, or has no such split.

    Raises:
        ConfigError: the yaml file cannot be used, or classes are given beside it.
    """
    file = _yaml_file(place)
    if file and classes:
        raise ConfigError("classes", f"{classes} beside {file.path}", "none, because that file names the classes")
    folder = file.path.parent if file else place
    named = file.images(split) if file else None
    if file and named is not None:
        reader = YoloLabels(file.names, file.keypoints)
        return FilePairs(f"{file.path}:{named.line}", _pairs(named), reader)
    for name in NAMES.get(split, ("",)):
        for images, labels in LAYOUTS if split in NAMES else WHOLE:
            pair = folder / images.format(split=name), folder / labels.format(split=name)
            if pair[0].is_dir() and pair[1].is_dir() and has_files(pair[1], ".txt"):
                return yolo_pairs(*pair, file or _names(classes, folder, pair[1]))
    return None


def _yaml_file(place: Path) -> YoloFile | None:
    if place.is_file():
        return read_yolo_file(place) if place.suffix in (".yaml", ".yml") else None
    return next((read_yolo_file(place / name) for name in YAML_NAMES if (place / name).is_file()), None)


def _names(classes: str, *folders: Path) -> YoloLabels:
    """Return the reader for classes that are given or lie in a ``classes.txt``."""
    files = [str(folder / "classes.txt") for folder in folders if (folder / "classes.txt").is_file()]
    if not classes and not files:
        raise ConfigError(
            "classes", f"no names for the numbers in {folders[-1]}", "names with commas between them, or a file",
            f"give {{classes}}, or put data.yaml or classes.txt into {folders[0]}",
        )  # fmt: skip
    return YoloLabels(tuple(read_class_names(classes or files[0])))


def yolo_pairs(images: Path, labels: Path, names: YoloFile | YoloLabels | str) -> FilePairs:
    """Pair the images below one folder with the label files of the same relative path below another.

    Args:
        images, labels: the folders.
        names: the classes, in a form of their own; see ``find_yolo``.

    Raises:
        ConfigError: a label file has no image.
    """
    if isinstance(names, str):
        names = _names(names, labels)
    reader = YoloLabels(names.names, names.keypoints)
    found = files_below(images)
    pairs = tuple((image, labels / image.relative_to(images).with_suffix(".txt")) for image in found)
    refuse_strays(_label_files(labels), pairs, images)
    return FilePairs(str(images), pairs, reader)


def _pairs(named: Named) -> tuple[tuple[Path, Path], ...]:
    """Find the label file of each image: with ``labels`` in place of the last ``images`` in its path, or beside it."""
    folders: dict[Path, Path] = {}
    for folder in {image.parent for image in named.paths}:
        parts = list(folder.parts)
        if "images" in parts:
            parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
        folders[folder] = Path(*parts) if Path(*parts).is_dir() else folder
    pairs = tuple((image, folders[image.parent] / f"{image.stem}.txt") for image in named.paths)
    for images, labels in folders.items() if named.folders else ():
        if labels != images:
            refuse_strays(_label_files(labels, deep=False), pairs, images)
    return pairs


def _label_files(folder: Path, *, deep: bool = True) -> list[Path]:
    files = files_below(folder, (".txt",)) if deep else [*folder.glob("*.txt")]
    return [path for path in files if path.name != "classes.txt"]
