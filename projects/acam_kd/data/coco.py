"""COCO-format datasets: the places of their files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import ConfigError
from .images import AUTO

__all__ = ["NAMES", "CocoSplit", "find_split"]

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

CONVERTED = "converted by acam-kd from "
"""The beginning of the description in a json that was made of another format; the user's file or folder follows."""

NAMES = {"train": ("train",), "val": ("val", "valid", "test")}


@dataclass(frozen=True)
class CocoSplit:
    """One split: its json, and the folder that the ``file_name`` entries are relative to."""

    json_file: str
    image_root: str
    image_range: str = AUTO
    """The range of grey values of more than 8 bits: see ``images.RANGES``."""


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
