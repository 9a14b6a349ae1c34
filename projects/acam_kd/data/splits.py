"""The places of a dataset's files: in COCO's format, or one that is converted to it, or images and label PNGs."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

from ..core.errors import ConfigError
from .coco import NAMES, CocoSplit, find_split
from .convert import FilePairs, convert, has_files
from .folders import ClassSplit, find_classes
from .images import AUTO
from .labels import read_class_names
from .voc import find_voc, voc_pairs
from .yolo import YAML_NAMES, find_yolo, yolo_pairs

__all__ = ["LabelSplit", "Split", "find_any_split", "find_whole", "named_split", "read_classes"]

CLASSES_FILE = "classes.txt"

logger = logging.getLogger("acam_kd")


@dataclass(frozen=True)
class LabelSplit:
    """One split of a segmentation dataset: its images, the label PNGs of the same names, the names of the classes."""

    image_root: str
    label_root: str
    classes: tuple[str, ...]
    """The names of class 0, 1, ..."""
    image_range: str = AUTO
    """The range of grey values of more than 8 bits: see ``images.RANGES``."""


Split = CocoSplit | LabelSplit | ClassSplit


def find_any_split(folder: str | Path, split: str, classes: str = "", image_range: str = AUTO) -> Split:
    """Find ``"train"`` or ``"val"`` of a dataset.

    ``train/images`` and ``train/labels`` with PNGs make a segmentation dataset. Its classes are in ``classes.txt``
    unless they are given. Other datasets are in COCO format, or in YOLO's or Pascal VOC's, which are converted to
    COCO's in the cache folder. Where none of these is, folders of images are classes: see ``find_classes``.

    Args:
        folder: the folder of the dataset, or the yaml file of one in YOLO's format.
        split: the name of the split.
        classes: see ``read_classes``.
        image_range: see ``images.RANGES``.

    Raises:
        ConfigError: no known layout is there, label PNGs have no names of classes, or names are given for a COCO json.
    """
    folder = Path(folder).expanduser()
    found = _find(folder, split, classes)
    if found is None:
        raise _nothing(folder, split)
    if split == "val" and isinstance(found, FilePairs) and _same(found, _find(folder, "train", classes)):
        logger.warning("%s: train and val are the same images, so the results say nothing of new ones", folder)
    return replace(convert(found) if isinstance(found, FilePairs) else found, image_range=image_range)


def _find(folder: Path, split: str, classes: str) -> Split | FilePairs | None:
    if folder.suffix.lower() == ".csv":
        return find_classes(folder, split)
    for name in NAMES.get(split, ()):
        images, labels = folder / name / "images", folder / name / "labels"
        if images.is_dir() and labels.is_dir() and not (_suffix(images, labels) or _only_yaml(folder, labels)):
            file = folder / CLASSES_FILE
            return LabelSplit(str(images), str(labels), read_classes(classes or (str(file) if file.is_file() else "")))
    coco = _whole_coco(folder) if split == "all" else _find_coco(folder, split)
    if coco:
        return _without_classes(coco, classes)
    return find_yolo(folder, split, classes) or find_voc(folder, split, classes) or find_classes(folder, split)


def _suffix(images: Path, labels: Path) -> str:
    """Return the suffix of a folder's label files of YOLO's or Pascal VOC's format; empty if there are PNGs or none."""
    if images != labels and has_files(labels, ".png"):
        return ""
    return next((suffix for suffix in (".txt", ".xml") if has_files(labels, suffix)), "")


def _only_yaml(folder: Path, labels: Path) -> bool:
    """Return True if a dataset has a yaml file as YOLO's, but no label PNG."""
    return any((folder / name).is_file() for name in YAML_NAMES) and not has_files(labels, ".png")


def _find_coco(folder: Path, split: str) -> CocoSplit | None:
    try:
        return find_split(folder, split)
    except ConfigError:
        return None


def _nothing(folder: Path, split: str) -> ConfigError:
    if folder.is_file():
        return ConfigError(
            "data", f"no {split} images in {folder.absolute()}", f"a yaml file as YOLO's, with {split}",
            "give {val_fraction} for a file without a split",
        )  # fmt: skip
    try:
        find_split(folder, split)
    except ConfigError as error:
        if not folder.exists():
            return error
        allowed = f"{error.allowed}, or {split}/images + {split}/labels with label PNGs, or a data.yaml as YOLO's, or "
        allowed += "Annotations + JPEGImages + ImageSets/Main as Pascal VOC's, or "
        allowed += f"{split}/CLASS/ with images for each class"
        return ConfigError(error.argument, error.value, allowed, "give {val_fraction} for a dataset without a split")
    raise AssertionError(folder)


def _same(first: FilePairs, second: object) -> bool:
    return isinstance(second, FilePairs) and first.pairs == second.pairs


def find_whole(folder: str | Path, classes: str = "", image_range: str = AUTO) -> Split:
    """Find the one annotated part of a dataset that has no split.

    It is the only json of the folder or of its ``annotations``, with the images in ``images`` or beside it; or YOLO's
    or Pascal VOC's files without a split; or a part to train on, label PNGs too, without one to validate on.

    Args:
        folder, classes, image_range: see ``find_any_split``.

    Raises:
        ConfigError: the dataset has a split, or none of these is there.
    """
    folder = Path(folder).expanduser()
    train, val = (_find(folder, split, classes) for split in ("train", "val"))
    if train and val and not (isinstance(val, FilePairs) and _same(val, train)):
        raise ConfigError("val_fraction", f"a fraction beside {folder}, which has a split", "a dataset without a split")
    found = train or val or _find(folder, "all", classes)
    if found is None:
        if not folder.exists():
            raise _nothing(folder, "train")
        allowed = "one json with the images in images/ or beside it, a data.yaml as YOLO's, or Pascal VOC's Annotations"
        hint = "or name json and images by {train_split}"
        raise ConfigError("data", f"no dataset without a split in {folder.absolute()}", allowed, hint)
    whole = convert(found) if isinstance(found, FilePairs) else found
    return replace(whole, image_range=image_range)


def _whole_coco(folder: Path) -> CocoSplit | None:
    """Find the only json of a folder, and the folder where its first image is."""
    files = [*folder.glob("*.json"), *(folder / "annotations").glob("*.json")] if folder.is_dir() else []
    for file in files if len(files) == 1 else ():
        try:
            content = json.loads(file.read_text(encoding="utf-8-sig"))
            first = str(content["images"][0]["file_name"])
        except (ValueError, TypeError, LookupError):
            first = ""  # the checks of the data say what is wrong with it
        roots = [folder / "images", file.parent, folder]
        return CocoSplit(str(file), str(next((root for root in roots if (root / first).is_file()), roots[0])))
    return None


def named_split(first: str, second: str, classes: str = "", image_range: str = AUTO) -> Split:
    """Make a split of its parts: a json and its images, or, if the first is a folder, images and labels.

    The labels are PNGs, or YOLO's text files, or Pascal VOC's xml files.

    Raises:
        ConfigError: labels have no names of classes, or names are given for a COCO json.
    """
    first, second = os.path.expanduser(first), os.path.expanduser(second)
    if not os.path.isdir(first):
        return replace(_without_classes(CocoSplit(first, second), classes), image_range=image_range)
    suffix = _suffix(Path(first), Path(second))
    if suffix:
        pairs = yolo_pairs if suffix == ".txt" else voc_pairs
        return replace(convert(pairs(Path(first), Path(second), classes)), image_range=image_range)
    return LabelSplit(first, second, read_classes(classes), image_range)


def _without_classes(split: CocoSplit, classes: str) -> CocoSplit:
    if classes:
        raise ConfigError(
            "classes",
            f"{classes} beside {split.json_file}",
            allowed="none, because a json names its categories itself",
            hint="{classes} is for labels without names",
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
