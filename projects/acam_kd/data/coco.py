"""COCO-format datasets: where their files are, and whether any COCO tool can read them."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["CocoSplit", "check_coco", "find_split"]

REQUIRED = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area", "iscrowd"),
    "categories": ("id", "name"),
}
TYPES: dict[str, type | tuple[type, ...]] = {
    "file_name": str,
    "width": int,
    "height": int,
    "bbox": list,
    "area": (int, float),
    "iscrowd": int,
}
"""Of the values that are not just any number or text."""
LAYOUTS = (
    ("{split}.json", "{split}"),
    ("{split}.json", "images"),
    ("annotations/instances_{split}2017.json", "{split}2017"),
    ("annotations/instances_{split}.json", "{split}"),
    ("annotations/instances_{split}.json", "images/{split}"),
    ("annotations/{split}.json", "{split}"),
    ("{split}/_annotations.coco.json", "{split}"),
)
"""Where a dataset's folder may have its json and its images; COCO's own layout and other common ones."""
NAMES = {"train": ("train",), "val": ("val", "valid", "test")}


@dataclass(frozen=True)
class CocoSplit:
    """One split: its json, and the folder that the ``file_name`` entries are relative to."""

    json_file: str
    image_root: str


def find_split(folder: str | Path, split: str) -> CocoSplit:
    """Find the json and the images of ``"train"`` or ``"val"`` in a dataset's folder.

    Raises:
        FileNotFoundError: no known layout is there; lists what was tried.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"no dataset folder {folder.absolute()}")
    for name in NAMES[split]:
        for json_file, images in LAYOUTS:
            found = CocoSplit(str(folder / json_file.format(split=name)), str(folder / images.format(split=name)))
            if os.path.isfile(found.json_file) and os.path.isdir(found.image_root):
                return found
    tried = ", ".join(
        f"{json_file.format(split=split)} + {images.format(split=split)}/" for json_file, images in LAYOUTS
    )
    raise FileNotFoundError(f"no {split} split in {folder.absolute()}: tried {tried}")


def check_coco(json_file: str, image_root: str, *, name: str, hint: str = "", masks: bool = False) -> dict[str, Any]:
    """Read a dataset's json, and raise for what would otherwise fail deep inside, partly only after training.

    Args:
        json_file: in COCO's instances format.
        image_root: folder of the images.
        name: the dataset's, for messages.
        hint: ends messages that an option or key can mend.
        masks: every annotation needs a ``segmentation`` too.

    Returns:
        What the json holds.

    Raises:
        FileNotFoundError: the json, the folder or an image does not exist.
        ValueError: the json is not what COCO tools need, or has a box outside its image.
    """
    hint = f" {hint}" if hint else ""
    if not os.path.isfile(json_file):
        raise FileNotFoundError(f"{name}: no file {os.path.abspath(json_file)}{hint}")
    if not os.path.isdir(image_root):
        raise FileNotFoundError(f"{name}: no folder {os.path.abspath(image_root)}{hint}")
    try:
        with open(json_file) as file:
            content = json.load(file)
    except ValueError as error:
        raise ValueError(f"{name}: {json_file} is not json: {error}") from error
    where = f"{name}: {json_file}"
    _check_parts(where, content, hint)
    _check_annotations(where, content, masks)
    if all(item["iscrowd"] for item in content["annotations"]):
        raise ValueError(f"{where} has no boxes that are not crowds{hint}")
    for image in content["images"]:
        path = os.path.join(image_root, image["file_name"])
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{name}: image {os.path.abspath(path)} of {json_file} does not exist")
    return content  # type: ignore[no-any-return]


def _check_parts(where: str, content: Any, hint: str) -> None:
    for part in REQUIRED:
        if not isinstance(content, dict) or not isinstance(content.get(part), list):
            raise ValueError(f"{where} is not in COCO format: it has no list {part!r}")
    for part, keys in REQUIRED.items():
        if not content[part]:
            raise ValueError(f"{where} has no {part}{hint}")
        for number, item in enumerate(content[part]):
            missing = [key for key in keys if not isinstance(item, dict) or key not in item]
            if missing:
                raise ValueError(f"{where}: {part}[{number}] has no {missing[0]!r}")
            wrong = [key for key in keys if not isinstance(item[key], TYPES.get(key, (int, float, str)))]
            if wrong:
                raise ValueError(f"{where}: {part}[{number}]: {wrong[0]} is {item[wrong[0]]!r}")
        if len({item["id"] for item in content[part]}) < len(content[part]):
            raise ValueError(f"{where}: two {part} have the same id")


def _check_annotations(where: str, content: dict[str, Any], masks: bool) -> None:
    images = {image["id"]: image for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    for number, item in enumerate(content["annotations"]):
        problem = ""
        if item["image_id"] not in images:
            problem = f"image_id {item['image_id']} is no image"
        elif item["category_id"] not in categories:
            problem = f"category_id {item['category_id']} is no category"
        elif masks and not item.get("segmentation"):
            problem = "it has no 'segmentation', which a model of masks needs"
        else:
            problem = _box_problem(item["bbox"], images[item["image_id"]])
        if problem:
            raise ValueError(f"{where}: annotations[{number}]: {problem}")


def _box_problem(box: Any, image: dict[str, Any]) -> str:
    """What is wrong with a box; one that sticks out a little, or is empty, is not: COCO's own has such."""
    if len(box) != 4:
        return f"bbox has {len(box)} numbers; [x, y, width, height] is needed"
    if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in box):
        return f"bbox {box} is not made of finite numbers"
    x, y, width, height = box
    if width < 0 or height < 0:
        return f"bbox {box} has a negative size; [x, y, width, height] is needed"
    if x >= image["width"] or y >= image["height"] or x + width < 0 or y + height < 0:
        return f"bbox {box} lies outside its image, which is {image['width']} x {image['height']}"
    return ""
