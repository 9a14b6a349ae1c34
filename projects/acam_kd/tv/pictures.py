"""Pictures of a student's predictions beside the ground truth, for a few validation images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from ..core.teacher import evaluating
from ..report.panels import Array
from ..report.results import Detections
from ..report.samples import Sample, sheet, spread
from .data import Images

__all__ = ["draw", "to_jpeg"]

COUNT = 8
SCORE = 0.3
"""Detections below this score are not drawn."""
MOST = 30
"""The largest number of detections drawn on an image."""


@torch.no_grad()
def draw(model: nn.Module, data: Images, device: torch.device, *, count: int = COUNT) -> Array:
    """Predict a few images of a dataset, and draw them beside the truth; every mode is restored.

    Returns:
        A picture, uint8 RGB (H, W, 3).
    """
    samples = []
    with evaluating(model):
        for index in spread(len(data), count):
            image, target = data[index]
            (output,) = model([image.to(device)])
            pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
            shape = {"shape": image.shape[1:]}
            parts = [_part({**values, **shape}, data.categories) for values in (target, output)]
            samples.append(Sample(np.ascontiguousarray(pixels), *parts))
    if data.semantic:
        names = [data.categories.get(label, str(label)) for label in range(data.num_classes)]
    else:
        names = [*data.categories.values()]
    return sheet(samples, names)


def to_jpeg(picture: Array) -> bytes:
    """Encode a picture as JPEG."""
    _, encoded = cv2.imencode(".jpg", picture[:, :, ::-1])
    return encoded.tobytes()


def _part(values: Mapping[str, Any], names: Mapping[int, str]) -> Detections | Array:
    if "semantic" in values:
        return values["semantic"].cpu().numpy()  # type: ignore[no-any-return]
    if "boxes" not in values:
        return _whole(values, names)
    labels: Sequence[int] = values["labels"].tolist()
    scores: Tensor | None = values.get("scores")
    kept = [k for k, label in enumerate(labels) if label in names and (scores is None or float(scores[k]) >= SCORE)]
    kept = kept if scores is None else kept[:MOST]
    boxes = values["boxes"].float().cpu().numpy().reshape(-1, 4)[kept]
    found = None if scores is None else scores.float().cpu().numpy()[kept]
    return Detections(boxes, [names[labels[k]] for k in kept], found)


def _whole(values: Mapping[str, Any], names: Mapping[int, str]) -> Detections:
    """Return the class of an image as a box around all of it."""
    height, width = values["shape"]
    label = values["label"] if "label" in values else int(values["scores"].argmax())
    score = None if "label" in values else values["scores"].float().max()[None].cpu().numpy()
    return Detections(np.array([[0.0, 0.0, width, height]]), [names.get(label, str(label))], score)
