"""Predictions beside the ground truth, as one picture. All pictures are uint8 RGB, (H, W, 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from .panels import Array, Colour, draw_detections
from .results import Detections

__all__ = ["OPACITY", "Sample", "colour_of", "sheet", "spread"]

SIDE = 320
"""The longest side of one image on a sheet, in pixels."""
OPACITY = 0.55
"""The opacity of the colours of a label map over the image."""
GAP, HEAD = 4, 20
SATURATION, BRIGHTNESS = 200, 255
GOLDEN = 0.381966
"""The turn of the colour wheel from one class to the next."""


@dataclass(frozen=True)
class Sample:
    """One image with the truth and the prediction: detections, or maps (H, W) of class numbers.

    Pixels of a map whose number is not among the ``colours`` are left as they are.
    """

    image: Array
    truth: Detections | Array
    predicted: Detections | Array


def spread(total: int, count: int) -> list[int]:
    """Choose indices that are spread evenly over a dataset, always the same ones.

    Example:
        >>> spread(10, 4), spread(2, 4)
        ([0, 2, 5, 7], [0, 1])
    """
    return sorted({number * total // count for number in range(count)}) if total > count else list(range(total))


def sheet(samples: Sequence[Sample], classes: Sequence[str], *, columns: int = 2) -> Array:
    """Draw the samples, each as a pair: the truth at the left, the prediction at the right.

    Args:
        samples: at least one.
        classes: the names of the classes; each has a colour of its own.
        columns: pairs in a row.
    """
    colours = {name: colour_of(number) for number, name in enumerate(classes)}
    pairs = [np.concatenate([_drawn(s.image, part, colours) for part in (s.truth, s.predicted)], 1) for s in samples]
    height, width = (max(pair.shape[axis] for pair in pairs) + GAP for axis in (0, 1))
    padded = [_padded(pair, height, width) for pair in pairs]
    padded += [np.full_like(padded[0], 255)] * (-len(padded) % columns)
    rows = [np.concatenate(padded[i : i + columns], 1) for i in range(0, len(padded), columns)]
    head = np.full((HEAD, rows[0].shape[1], 3), 255, np.uint8)
    text = "ground truth | prediction"
    cv2.putText(head, text, (4, HEAD - 6), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (40, 40, 40), 1, cv2.LINE_AA)
    return np.concatenate([head, *rows])


def _padded(picture: Array, height: int, width: int) -> Array:
    rest = (height - picture.shape[0], width - picture.shape[1])
    return np.pad(picture, ((0, rest[0]), (0, rest[1]), (0, 0)), constant_values=255)


def _drawn(image: Array, part: Detections | Array, colours: dict[str, Colour]) -> Array:
    scale = SIDE / max(image.shape[:2])
    size = tuple(max(1, round(side * scale)) for side in image.shape[1::-1])
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    if isinstance(part, Detections):
        shades = [colours[label] for label in part.labels]
        boxes = np.asarray(part.boxes, float).reshape(-1, 4) * scale
        out = draw_detections(small, boxes, part.labels, part.scores, shades)
    else:
        table = np.array([*colours.values()], np.uint8)
        numbers = cv2.resize(part.astype(np.int32), size, interpolation=cv2.INTER_NEAREST)
        known = (numbers >= 0) & (numbers < len(table))
        painted = (1 - OPACITY) * small + OPACITY * table[np.where(known, numbers, 0)]
        out = np.where(known[..., None], painted.round().astype(np.uint8), small)
    return _padded(out, out.shape[0], out.shape[1] + GAP)


def colour_of(number: int) -> Colour:
    """Return the colour of a class: hues far apart for neighbours, and black for a map's class 0."""
    hue = round(number * GOLDEN * 180) % 180
    pixel = cv2.cvtColor(np.array([[[hue, SATURATION, BRIGHTNESS]]], np.uint8), cv2.COLOR_HSV2RGB)
    red, green, blue = pixel[0, 0].tolist()
    return red, green, blue
