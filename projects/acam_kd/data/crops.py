"""A classification dataset made of a detection dataset: each box is cut out as a square image of its class."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..core.errors import ConfigError
from .check import Needs, check_coco
from .coco import CocoSplit
from .images import read_rgb

__all__ = ["make_crops", "square"]

MEAN_COLOUR = (124, 116, 104)
"""ImageNet's mean colour, where a square reaches beyond its image; ours."""
Array = np.ndarray[Any, Any]


def square(image: Array, box: tuple[float, float, float, float], margin: float) -> Array:
    """Cut a square around a box, whose side is the longer one of the box with a margin.

    Args:
        image: (H, W, 3), uint8.
        box: x, y, width, height in pixels.
        margin: added to the side on both ends together, as a part of it.

    Example:
        >>> square(np.zeros((10, 10, 3), np.uint8), (2, 2, 4, 6), 0.0).shape
        (6, 6, 3)
    """
    x, y, width, height = box
    side = max(1, round(max(width, height) * (1 + margin)))
    left, top = round(x + width / 2 - side / 2), round(y + height / 2 - side / 2)
    found = np.empty((side, side, 3), np.uint8)
    found[:] = MEAN_COLOUR
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + side, image.shape[1]), min(top + side, image.shape[0])
    if x1 > x0 and y1 > y0:
        found[y0 - top : y1 - top, x0 - left : x1 - left] = image[y0:y1, x0:x1]
    return found


def make_crops(
    splits: Mapping[str, CocoSplit], folder: str | Path, *, margin: float = 0.2, smallest: float = 8.0
) -> dict[str, Counter[str]]:
    """Write ``folder/SPLIT/CLASS/*.png`` with a square for each box; crowds and small boxes are left out.

    Half a dataset is never found under the final name.

    Args:
        splits: the name of a part -> its files.
        folder: must not exist.
        margin: see ``square``.
        smallest: the longer side of a box, in pixels, from which on it is taken.

    Returns:
        Part -> class -> the number of its images.

    Raises:
        ConfigError: the folder exists, the data is broken, or a class has no image in one of the parts.
    """
    folder = Path(folder)
    if folder.exists():
        raise ConfigError("output", f"{folder}, which exists", "a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        counts = {part: _write(split, building / part, part, margin, smallest) for part, split in splits.items()}
        _check_classes(counts)
        building.chmod(0o755)
        os.rename(building, folder)
    except BaseException:
        shutil.rmtree(building)
        raise
    return counts


def _write(split: CocoSplit, folder: Path, part: str, margin: float, smallest: float) -> Counter[str]:
    content = check_coco(
        split.json_file, split.image_root, name=f"{part} data", needs=Needs(), image_range=split.image_range
    ).content
    names = {c["id"]: re.sub(r"[^\w. -]", "_", str(c["name"])) for c in content["categories"]}
    boxes: dict[int, list[dict[str, Any]]] = {}
    for a in content["annotations"]:
        if not a.get("iscrowd") and max(a["bbox"][2:]) >= smallest:
            boxes.setdefault(a["image_id"], []).append(a)
    counts = Counter[str]()
    for entry in content["images"]:
        if entry["id"] not in boxes:
            continue
        image = np.asarray(read_rgb(os.path.join(split.image_root, entry["file_name"]), split.image_range))
        stem = Path(entry["file_name"]).with_suffix("").as_posix().replace("/", "_")
        for a in boxes[entry["id"]]:
            name = names[a["category_id"]]
            file = folder / name / f"{stem}_{a['id']}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            cut = cv2.cvtColor(square(image, tuple(a["bbox"]), margin), cv2.COLOR_RGB2BGR)
            if not cv2.imwrite(str(file), cut):
                raise OSError(f"{file} cannot be written")
            counts[name] += 1
    return counts


def _check_classes(counts: Mapping[str, Counter[str]]) -> None:
    every = sorted({name for part in counts.values() for name in part})
    for part, found in counts.items():
        if missing := [name for name in every if name not in found]:
            hint = "leave the class out of the data, or divide it otherwise"
            raise ConfigError("data", f"no box of {', '.join(missing)} in {part}", "one of every class in each", hint)
