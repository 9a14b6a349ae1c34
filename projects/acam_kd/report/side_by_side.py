"""One picture of the detections of several models in the same images, for a reader who has half a minute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import cv2
import numpy as np

from .panels import Array, draw_detections
from .results import OVERLAP, Detections, Example, hits, overlap

__all__ = ["side_by_side", "strongest"]

SIDE = 288
"""The longest side of one image, in pixels."""
GAP, HEAD = 8, 30
INK = (40, 40, 40)
RIGHT, WRONG = (60, 220, 90), (235, 60, 50)


def side_by_side(examples: Sequence[Example], heads: Mapping[str, str]) -> Array:
    """Draw a row per example: the image as it is, then the detections of each model, green if right and red if wrong.

    A model shows at most as many detections as there are objects: see ``strongest``.

    Args:
        examples: at least one, all of one size.
        heads: name of a model, as in ``Example.detections`` -> the heading of its column.

    Returns:
        uint8 RGB, (H, W, 3), on white.
    """
    rows = [_row([_heading("image"), *(_heading(text) for text in heads.values())])]
    for example in examples:
        count = len(example.ground_truth.boxes)
        shown = [strongest(example.detections[name], count) for name in heads]
        drawn = [_drawn(example.image, found, hits(found, example.ground_truth)) for found in shown]
        rows.append(_row([_drawn(example.image, Detections(np.zeros((0, 4)), []), []), *drawn]))
    return np.concatenate(rows)[:, :-GAP]


def strongest(found: Detections, count: int) -> Detections:
    """Keep the detections with the highest scores, of those that overlap one alone, whatever their labels.

    Args:
        found: the detections of one image.
        count: how many to keep at most.

    Example:
        >>> boxes = np.array([[0, 0, 9, 9], [0, 0, 9, 8], [20, 20, 29, 29]])
        >>> strongest(Detections(boxes, ["disc", "square", "disc"], np.array([0.5, 0.6, 0.4])), 2).labels
        ['square', 'disc']
    """
    scores = np.ones(len(found.boxes)) if found.scores is None else found.scores
    kept: list[int] = []
    for k in np.argsort(-scores, kind="stable").tolist():
        if all(overlap(found.boxes[k], found.boxes[other]) < OVERLAP for other in kept):
            kept.append(k)
    kept = kept[:count]
    return Detections(found.boxes[kept], [found.labels[k] for k in kept], scores[kept])


def _drawn(image: Array, found: Detections, right: Sequence[bool]) -> Array:
    scale = SIDE / max(image.shape[:2])
    size = tuple(round(side * scale) for side in image.shape[1::-1])
    large = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC)
    boxes = np.asarray(found.boxes, float).reshape(-1, 4) * scale
    return draw_detections(large, boxes, found.labels, None, [RIGHT if hit else WRONG for hit in right])


def _heading(text: str) -> Array:
    out = np.full((HEAD, SIDE, 3), 255, np.uint8)
    cv2.putText(out, text, (2, HEAD - 10), cv2.FONT_HERSHEY_SIMPLEX, 0.55, INK, 1, cv2.LINE_AA)
    return out


def _row(pictures: Sequence[Array]) -> Array:
    padded = [np.pad(picture, ((0, GAP), (0, GAP), (0, 0)), constant_values=255) for picture in pictures]
    return np.concatenate(padded, 1)
