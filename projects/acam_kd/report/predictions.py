"""Predictions for pictures without a truth, as one function of an image, whatever the model behind it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np

from .panels import Array, draw_detections
from .samples import OPACITY, colour_of

__all__ = ["Prediction", "Predictor", "draw_prediction"]

LOWEST = 0.05
"""Keypoints with a score below it are not drawn."""
MOST = 100
"""The largest number of detections drawn on an image."""
READABLE = 160
"""The shorter side that a picture with the name of its class has at least."""


@dataclass(frozen=True)
class Prediction:
    """The output for one image: detections, the best first, a map of class numbers, or the probabilities of classes.

    Args:
        boxes: (K, 4), x0, y0, x1, y1 in pixels.
        labels: (K,) class numbers.
        scores: (K,).
        masks: (K, H, W), bool; None for a model without.
        semantic: (H, W), class numbers; None for a detector.
        keypoints: (K, P, 3), x and y in pixels and a score; None for a model without.
        probabilities: (C,), of the classes of the whole image; None for a model that is no classifier.
    """

    boxes: Array
    labels: Array
    scores: Array
    masks: Array | None = None
    semantic: Array | None = None
    keypoints: Array | None = None
    probabilities: Array | None = None

    @classmethod
    def of_map(cls, semantic: Array) -> Prediction:
        """Make the prediction of a segmentation model."""
        return cls(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0), semantic=semantic)

    @classmethod
    def of_classes(cls, probabilities: Array) -> Prediction:
        """Make the prediction of a classifier."""
        return cls(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0), probabilities=probabilities)

    def best(self, count: int) -> list[tuple[int, float]]:
        """List a classifier's most probable classes with their probabilities; nothing for another model."""
        if self.probabilities is None:
            return []
        order = np.argsort(-self.probabilities, kind="stable")[:count]
        return [(int(k), float(self.probabilities[k])) for k in order]


class Predictor(Protocol):
    """A model that predicts an image, uint8 RGB (H, W, 3)."""

    @property
    def categories(self) -> Mapping[int, str]:
        """Class number -> name."""

    def __call__(self, image: Array) -> Prediction:
        """Predict one image."""


def draw_prediction(image: Array, found: Prediction, categories: Mapping[int, str], *, score: float) -> Array:
    """Draw a prediction on a copy of the image.

    Args:
        image: uint8 RGB (H, W, 3).
        found: for this image.
        categories: class number -> name.
        score: detections below it are left out.
    """
    if found.semantic is not None:
        return _painted(image, found.semantic)
    if found.probabilities is not None:
        return _named(image, found, categories)
    kept = [k for k in np.flatnonzero(found.scores >= score).tolist() if int(found.labels[k]) in categories][:MOST]
    out = image.copy()
    labels = [int(found.labels[k]) for k in kept]
    if found.masks is not None:
        for k, label in zip(reversed(kept), reversed(labels)):
            out[found.masks[k]] = (0.5 * out[found.masks[k]] + 0.5 * np.array(colour_of(label))).round()
    names, colours = [categories[label] for label in labels], [colour_of(label) for label in labels]
    out = draw_detections(out, found.boxes[kept], names, found.scores[kept], colours)
    if found.keypoints is not None:
        for k, colour in zip(kept, colours):
            _draw_keypoints(out, found.keypoints[k], colour)
    return out


def _named(image: Array, found: Prediction, categories: Mapping[int, str]) -> Array:
    """Write the most probable class on the image, which is made large enough for words."""
    factor = max(1, -(-READABLE // min(image.shape[:2])))
    image = image.repeat(factor, 0).repeat(factor, 1)
    ((label, probability),) = found.best(1)
    whole = np.array([[0.0, 0.0, image.shape[1], image.shape[0]]])
    name = categories.get(label, str(label))
    return draw_detections(image, whole, [name], np.array([probability]), [colour_of(label)])


def _draw_keypoints(out: Array, points: Array, colour: tuple[int, int, int]) -> None:
    """Draw the keypoints (P, 3) of one object as dots, those with a score."""
    radius = max(2, min(out.shape[:2]) // 200)
    for x, y, score in points.tolist():
        if score > LOWEST:
            cv2.circle(out, (round(x), round(y)), radius, colour, -1)
            cv2.circle(out, (round(x), round(y)), radius + 1, (0, 0, 0), 1)


def _painted(image: Array, semantic: Array) -> Array:
    table = np.array([colour_of(number) for number in range(256)])
    colours = table[semantic.clip(0, 255)]
    return ((1 - OPACITY) * image + OPACITY * colours).round().astype(np.uint8)
