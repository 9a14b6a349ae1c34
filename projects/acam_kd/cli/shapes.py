"""``acam-kd shapes``: a drawn dataset, for trials with any tool that reads COCO's format."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from ..data.shapes import make_shapes
from ..fields import instance, natural, option
from .command import Command, Values

__all__ = ["COMMAND"]


def _size(text: str) -> int:
    value = natural(text)
    if value < 64:
        raise argparse.ArgumentTypeError(f"found {value}, expected at least 64")
    return value


@dataclass(frozen=True)
class Shapes:
    """The options of the drawing."""

    output: Path = option(
        Path("datasets"), type=Path, metavar="FOLDER", help="gets a folder shapes_SIZE_SEED; one found there is kept"
    )
    size: int = option(160, type=_size, metavar="PIXELS", help="height and width of the images")
    seed: int = option(0, type=natural, metavar="N", help="decides what is drawn; 0 if left out")


def run(values: Values) -> None:
    """Draw the dataset, unless it is there, and print its folder."""
    asked = instance(Shapes, values)
    print(make_shapes(asked.output, size=asked.size, seed=asked.seed))


COMMAND = Command(
    "shapes",
    "draw a dataset of shapes, with boxes and masks in COCO's format",
    run,
    (Shapes,),
    "acam-kd shapes --output datasets",
)
