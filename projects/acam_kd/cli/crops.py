"""``acam-kd crops``: a classification dataset made of the boxes of a detection dataset."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..core.errors import ConfigError
from ..data.coco import CocoSplit
from ..data.crops import make_crops
from ..fields import instance, option
from .command import Command, Values
from .data import Data

__all__ = ["COMMAND"]


@dataclass(frozen=True)
class Crops:
    """The options of the cutting."""

    output: Path = option(section="the crops", type=Path, metavar="FOLDER", help="gets train/CLASS/ and val/CLASS/")
    margin: float = option(0.2, type=float, metavar="M", help="added to the side of the square around a box")
    smallest: float = option(8.0, type=float, metavar="PIXELS", help="boxes whose longer side is below are left out")


def run(values: Values) -> None:
    """Cut the boxes out, and print the number of images of each class.

    Raises:
        ConfigError: the data has no boxes, or a class none in one of the parts.
    """
    asked = instance(Crops, values)
    if asked.margin < 0:
        raise ConfigError("margin", asked.margin, ">= 0")
    splits: dict[str, CocoSplit] = {}
    for name, split in instance(Data, values).splits("train", "val").items():
        if not isinstance(split, CocoSplit):
            raise ConfigError("data", f"a {name} split without boxes", "data for detection")
        splits[name] = split
    counts = make_crops(splits, asked.output, margin=asked.margin, smallest=asked.smallest)
    for name, found in counts.items():
        each = ", ".join(f"{cls} {found[cls]}" for cls in sorted(found))
        print(f"{name}: {sum(found.values())} images: {each}")
    print(asked.output)


COMMAND = Command(
    "crops",
    "cut the boxes of a detection dataset out, as images with one class each",
    run,
    (Data, Crops),
    "acam-kd crops --data FOLDER --output FOLDER_crops",
)
