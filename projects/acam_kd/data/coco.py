"""COCO-format datasets: the places of their files, and a check that COCO tools can read them."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError

__all__ = ["CocoSplit", "check_coco", "find_split"]

REQUIRED = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area", "iscrowd"),
    "categories": ("id", "name"),
}
TYPES: dict[str, tuple[type | tuple[type, ...], str]] = {
    "file_name": (str, "a text"),
    "width": (int, "a whole number"),
    "height": (int, "a whole number"),
    "bbox": (list, "a list"),
    "area": ((int, float), "a number"),
    "iscrowd": (int, "a whole number"),
}
"""Key -> the type of its value, and that type in words."""
ANY = ((int, float, str), "a number or a text")
"""The same for all other keys."""
LAYOUTS = (
    ("{split}.json", "{split}"),
    ("{split}.json", "images"),
    ("annotations/instances_{split}2017.json", "{split}2017"),
    ("annotations/instances_{split}.json", "{split}"),
    ("annotations/instances_{split}.json", "images/{split}"),
    ("annotations/{split}.json", "{split}"),
    ("{split}/_annotations.coco.json", "{split}"),
)
"""The known places of the json and of the images in a dataset's folder: COCO's own layout and other common ones."""
NAMES = {"train": ("train",), "val": ("val", "valid", "test")}


@dataclass(frozen=True)
class CocoSplit:
    """One split: its json, and the folder that the ``file_name`` entries are relative to."""

    json_file: str
    image_root: str


def find_split(folder: str | Path, split: str) -> CocoSplit:
    """Find the json and the images of ``"train"`` or ``"val"`` in a dataset's folder.

    Raises:
        ConfigError: the folder does not exist, or no known layout is there; the message lists the layouts.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ConfigError("data", f"no dataset folder {folder.absolute()}", allowed="the folder of a dataset")
    for name in NAMES[split]:
        for json_file, images in LAYOUTS:
            place = CocoSplit(str(folder / json_file.format(split=name)), str(folder / images.format(split=name)))
            if os.path.isfile(place.json_file) and os.path.isdir(place.image_root):
                return place
    tried = ", ".join(
        f"{json_file.format(split=split)} + {images.format(split=split)}/" for json_file, images in LAYOUTS
    )
    raise ConfigError("data", f"no {split} split in {folder.absolute()}", allowed=f"one of {tried}")


def check_coco(
    json_file: str,
    image_root: str,
    *,
    name: str,
    masks: bool = False,
) -> dict[str, Any]:
    """Read a dataset's json, and refuse a dataset that would fail later, partly only after training.

    Args:
        json_file: a file in COCO's instances format.
        image_root: the folder of the images.
        name: the dataset's name in messages.
        masks: every annotation needs a ``segmentation`` too.

    Returns:
        The content of the json.

    Raises:
        ConfigError: the json, the folder or an image does not exist, the json lacks something that COCO tools need,
            or a box lies outside its image.
    """
    if not os.path.isfile(json_file):
        raise ConfigError("dataset", f"{name}: no file {os.path.abspath(json_file)}", allowed="a json in COCO format")
    if not os.path.isdir(image_root):
        raise ConfigError("dataset", f"{name}: no folder {os.path.abspath(image_root)}", allowed="a folder of images")
    where = f"{name}: {json_file}"
    try:
        with open(json_file) as file:
            content = json.load(file)
    except ValueError as error:
        raise ConfigError(
            "dataset", f"{where}, which is not json ({error})", allowed="a json in COCO format"
        ) from error
    _check_parts(where, content)
    _check_annotations(where, content, masks)
    if all(item["iscrowd"] for item in content["annotations"]):
        raise ConfigError("dataset", f"{where} with crowds only", allowed="at least one box that is not a crowd")
    for image in content["images"]:
        path = os.path.join(image_root, image["file_name"])
        if not os.path.isfile(path):
            raise ConfigError(
                "dataset", f"{name}: no image {os.path.abspath(path)}", allowed=f"every image of {json_file}"
            )
    return content  # type: ignore[no-any-return]


def _check_parts(where: str, content: Any) -> None:
    for part in REQUIRED:
        if not isinstance(content, dict) or not isinstance(content.get(part), list):
            allowed = "lists of images, annotations and categories, as in COCO format"
            raise ConfigError("dataset", f"{where} without a list {part!r}", allowed=allowed)
    for part, keys in REQUIRED.items():
        if not content[part]:
            raise ConfigError("dataset", f"{where} with no {part}", allowed="at least one")
        for number, item in enumerate(content[part]):
            missing = [key for key in keys if not isinstance(item, dict) or key not in item]
            if missing:
                raise ConfigError(
                    "dataset", f"{where}: {part}[{number}] without {missing[0]!r}", allowed=", ".join(keys)
                )
            for key in keys:
                kinds, words = TYPES.get(key, ANY)
                if not isinstance(item[key], kinds):
                    raise ConfigError("dataset", f"{where}: {part}[{number}] with {key} {item[key]!r}", allowed=words)
        if len({item["id"] for item in content[part]}) < len(content[part]):
            raise ConfigError("dataset", f"{where}: two {part} with the same id", allowed="an id for each")


def _check_annotations(where: str, content: dict[str, Any], masks: bool) -> None:
    images = {image["id"]: image for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    for number, item in enumerate(content["annotations"]):
        if item["image_id"] not in images:
            problem = f"with image_id {item['image_id']}", "the id of an image"
        elif item["category_id"] not in categories:
            problem = f"with category_id {item['category_id']}", "the id of a category"
        elif masks and not item.get("segmentation"):
            problem = "without 'segmentation'", "the outline or mask that a model of masks needs"
        else:
            problem = _box_problem(item["bbox"], images[item["image_id"]])
        if problem[0]:
            raise ConfigError("dataset", f"{where}: annotations[{number}] {problem[0]}", allowed=problem[1])


def _box_problem(box: Any, image: dict[str, Any]) -> tuple[str, str]:
    """Describe a wrong box and a right one in words; both are empty for a box that can be used.

    A box may be empty, or reach a little beyond its image: COCO itself has such boxes.
    """
    form = "[x, y, width, height]"
    if len(box) != 4:
        return f"with a bbox of {len(box)} numbers", form
    if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in box):
        return f"with bbox {box}", f"four finite numbers, {form}"
    x, y, width, height = box
    if width < 0 or height < 0:
        return f"with bbox {box}, which has a negative size", form
    if x >= image["width"] or y >= image["height"] or x + width < 0 or y + height < 0:
        return f"with bbox {box}, which lies outside its image", f"a box in {image['width']} x {image['height']} pixels"
    return "", ""
