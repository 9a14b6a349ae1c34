"""The files of pseudo-labels: a COCO json of boxes, or a PNG of class numbers for each image."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError

__all__ = ["MADE", "Boxes", "class_names", "json_of", "label_files"]

MADE = "made.json"
"""The file that is written last, so that a folder with it is complete."""

Box = tuple[float, float, float, float, int, float]
"""Corners x0, y0, x1, y1 in pixels, label, score."""


@dataclass(frozen=True)
class Boxes:
    """The pseudo-labels of one image.

    Args:
        number: of the image, from 0.
        width, height: in pixels.
        boxes: those that are kept; empty for a label map.
        sure: the part of the pixels of a label map that has a class.
    """

    number: int
    width: int
    height: int
    boxes: Sequence[Box] = ()
    sure: float = 0.0


def json_of(found: Sequence[Boxes], paths: Sequence[str], root: str, categories: Mapping[int, str]) -> dict[str, Any]:
    """Return the content of a json in COCO's format; each box keeps its score.

    Args:
        found: of all images.
        paths: those of the images.
        root: the folder that the names in the json are relative to.
        categories: label -> name; labels are the ids of the categories.
    """
    images, annotations = [], list[dict[str, Any]]()
    for item in found:
        name = Path(os.path.relpath(os.path.abspath(paths[item.number]), root)).as_posix()
        images.append({"id": item.number + 1, "file_name": name, "width": item.width, "height": item.height})
        for x0, y0, x1, y1, label, score in item.boxes:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": item.number + 1,
                    "category_id": label,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": 0,
                    "score": score,
                }  # fmt: skip
            )
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": label, "name": name} for label, name in categories.items()],
    }


def label_files(folders: Mapping[str, Sequence[str]], place: Path) -> list[Path]:
    """Return the label PNG of every image: below the number of its folder, with its relative path and stem.

    Raises:
        ConfigError: two images would have one label.
    """
    files: dict[Path, str] = {}
    for number, (folder, paths) in enumerate(folders.items()):
        for path in paths:
            file = place / str(number) / Path(os.path.relpath(path, folder)).with_suffix(".png")
            if file in files:
                raise ConfigError(
                    "unlabelled", f"{path} beside {files[file]}", "different names, since their labels have them too"
                )
            files[file] = path
    return list(files)


def class_names(categories: Mapping[int, str], number: int) -> tuple[str, ...]:
    """Return a name for every label of a segmentation model; a label without one is the background.

    Example:
        >>> class_names({1: "road"}, 3)
        ('background 0', 'road', 'background 2')
    """
    return tuple(categories.get(label, f"background {label}") for label in range(number))
