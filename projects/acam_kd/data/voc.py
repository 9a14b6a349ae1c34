"""Datasets in Pascal VOC's format: an xml file of boxes per image, and lists of the images of each split."""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import ConfigError
from .coco import NAMES
from .convert import FilePairs, Thing, cached, files_below, has_files, outside, refuse_strays
from .labels import read_class_names
from .xml_file import Element, read_xml

__all__ = ["VocLabels", "find_voc", "voc_pairs"]

FOLDERS = (("Annotations", "JPEGImages"), ("Annotations", "images"), ("annotations", "images"), ("Annotations", "."))
"""The known places of xml files and images."""
NAME_FILES = ("classes.txt", "labels.txt")

logger = logging.getLogger("acam_kd")


@dataclass(frozen=True)
class VocLabels:
    """A reader of Pascal VOC's xml files."""

    names: tuple[str, ...]

    def read(self, path: Path, width: int, height: int) -> list[Thing]:
        """Read the objects of an image; see ``convert.Reader``.

        Coordinates count pixels from 1, and the last pixel belongs to the box. Objects marked difficult are crowds:
        they are neither trained on nor right or wrong in the evaluation.

        Raises:
            ConfigError: the file does not parse, is of another image, or an object has no usable name or box.
        """
        root = read_xml(path)
        if size := root.first("size"):
            declared = size.value("width"), size.value("height")
            if declared not in ((str(width), str(height)), ("0", "0"), ("", "")):
                found = f"{size.where}: a size of {' x '.join(declared)}"
                raise ConfigError("dataset", found, f"{width} x {height}, as its image is read")
        return [self._thing(item, width, height) for item in root.all("object")]

    def _thing(self, item: Element, width: int, height: int) -> Thing:
        name = item.value("name")
        if name not in self.names:
            where = (item.first("name") or item).where
            found = f"{where}: an object {name}" if name else f"{where}: an object without a name"
            raise ConfigError("dataset", found, f"one of {_shown(self.names)}")
        bounds = item.first("bndbox")
        if bounds is None:
            raise ConfigError("dataset", f"{item.where}: an object without bndbox", "a box for each object")
        x0, y0, x1, y1 = (_number(bounds, tag) for tag in ("xmin", "ymin", "xmax", "ymax"))
        if x1 < x0 or y1 < y0:
            found = f"{bounds.where}: a box from {x0:g}, {y0:g} to {x1:g}, {y1:g}"
            raise ConfigError("dataset", found, "xmin <= xmax and ymin <= ymax")
        left, top = max(x0 - 1, min(x0, 0.0)), max(y0 - 1, min(y0, 0.0))  # some tools count from 0
        box = left, top, x1 - left, y1 - top
        if outside(box, width, height) or not (-width <= x0 and x1 <= 2 * width and -height <= y0 and y1 <= 2 * height):
            found = f"{bounds.where}: a box from {x0:g}, {y0:g} to {x1:g}, {y1:g}"
            raise ConfigError("dataset", found, f"a box in {width} x {height} pixels")
        return Thing(self.names.index(name), box, crowd=item.value("difficult") == "1")


def _number(bounds: Element, tag: str) -> float:
    text = bounds.value(tag)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        where = (bounds.first(tag) or bounds).where
        raise ConfigError("dataset", f"{where}: {tag} {text or 'missing'}", "a finite number of pixels")
    return value


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def find_voc(place: Path, split: str, classes: str = "") -> FilePairs | None:
    """Find a split of a dataset in Pascal VOC's format.

    The images are named by ``ImageSets/Main/train.txt`` and so on, or lie with their xml files in ``train``. The names
    of the classes are given, or in ``classes.txt``, or those of all objects of the dataset by alphabet.

    Args:
        place: the folder of the dataset.
        split: ``"train"``, ``"val"``, or ``"all"`` for a dataset without a split.
        classes: see ``read_class_names``.

    Returns:
        Images and xml files. None if this is no such dataset, or has no such split.

    Raises:
        ConfigError: an image or xml file does not exist, or the names of the classes cannot be used.
    """
    for name in NAMES.get(split, ()):
        if (place / name).is_dir() and has_files(place / name, ".xml"):
            splits = [place / other for names in NAMES.values() for other in names]
            return voc_pairs(place / name, place / name, _names(classes, place, splits))
    for xmls, images in FOLDERS:
        if (place / xmls).is_dir() and (place / images).is_dir() and has_files(place / xmls, ".xml"):
            folders = place / images, place / xmls
            break
    else:
        if split != "all" or not (place.is_dir() and any(place.glob("*.xml"))):
            return None
        folders = place, place
    lists = _lists(place / "ImageSets" / "Main", split)
    if lists is None and split != "all":
        return None
    reader = _names(classes, place, [folders[1]])
    if lists is None:
        return voc_pairs(*folders, reader)
    return FilePairs(str(lists), tuple(_listed(lists, *folders)), reader)


def _lists(folder: Path, split: str) -> Path | None:
    """Find the list of a split; ``trainval.txt`` is one to train on if another is evaluated, or the whole."""
    lists = {path.stem for path in folder.glob("*.txt")}
    wanted = {"train": ("train",), "val": NAMES["val"], "all": ("trainval",)}[split]
    if split == "train" and "test" in lists and not lists & {"train", "val", "valid"}:
        wanted = ("trainval",)
    return next((folder / f"{name}.txt" for name in wanted if name in lists), None)


def _listed(file: Path, images: Path, xmls: Path) -> Iterable[tuple[Path, Path]]:
    known = _by_stem(images)
    for number, line in enumerate(file.read_text(encoding="utf-8-sig", errors="replace").splitlines(), 1):
        name = line.strip().strip('"')
        if name not in known and name.endswith((" 1", "-1", " 0")):  # lists of one class say whether it is there
            name = name.rpartition(" ")[0].strip()
        if not name:
            continue
        if name not in known:
            raise ConfigError("dataset", f"{file}:{number}: no image {name}", f"an image of that name in {images}")
        yield known[name], xmls / f"{name}.xml"


def _by_stem(images: Path) -> dict[str, Path]:
    known: dict[str, Path] = {}
    for path in files_below(images):
        name = path.relative_to(images).with_suffix("").as_posix()
        if name in known:
            raise ConfigError("dataset", f"{known[name]} and {path.name}", "one image for an xml file")
        known[name] = path
    return known


def voc_pairs(images: Path, xmls: Path, names: VocLabels | str) -> FilePairs:
    """Pair the images below one folder with the xml files of the same relative path below another.

    Args:
        images, xmls: the folders, perhaps the same.
        names: the reader, or the names of the classes; see ``find_voc``.

    Raises:
        ConfigError: an xml file has no image.
    """
    reader = _names(names, xmls, [xmls]) if isinstance(names, str) else names
    known = _by_stem(images)
    pairs = tuple((image, xmls / f"{name}.xml") for name, image in known.items())
    refuse_strays(files_below(xmls, (".xml",)), pairs, images)
    return FilePairs(str(images), pairs, reader)


def _names(classes: str, folder: Path, xmls: Iterable[Path]) -> VocLabels:
    """Return the reader for classes that are given, lie in a file, or are those of all objects."""
    file = next((folder / name for name in NAME_FILES if (folder / name).is_file()), None)
    if classes or file:
        return VocLabels(tuple(read_class_names(classes or str(file))))
    files = [path for place in xmls if place.is_dir() for path in files_below(place, (".xml",))]
    content = itertools.chain([b"classes"], (path.read_bytes() for path in files))
    counts = json.loads(cached(content, lambda: _counts(folder, files)).read_text())
    if not counts:
        raise ConfigError("dataset", f"{folder} with {len(files)} xml files and no object", "at least one object")
    return VocLabels(tuple(sorted(counts)))


def _counts(folder: Path, files: Iterable[Path]) -> dict[str, int]:
    names = (item.value("name") for path in files for item in read_xml(path).all("object"))
    counts = Counter(name for name in names if name)
    listed = ", ".join(f"{name} ({counts[name]} objects)" for name in sorted(counts))
    logger.info("%s: the classes are %s", folder, listed)
    return counts
