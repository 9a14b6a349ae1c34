"""Pictures of a few validation images: a student's predictions beside the ground truth, and a method's masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from ..core import Distillation
from ..core.teacher import evaluating
from ..report.panels import Array, mask_panel, stack
from ..report.results import Detections
from ..report.samples import Sample, sheet, spread
from .data import Images
from .distillation import normalized_batch

__all__ = ["draw", "draw_masks", "masks_of", "to_jpeg"]

COUNT = 8
MASKED = 4
"""The number of images with their masks."""
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
            shape = {"shape": image.shape[1:]}
            parts = [_part({**values, **shape}, data.categories) for values in (target, output)]
            samples.append(Sample(_pixels(image), *parts))
    if data.semantic:
        names = [data.categories.get(label, str(label)) for label in range(data.num_classes)]
    else:
        names = [*data.categories.values()]
    return sheet(samples, names)


def masks_of(student: nn.Module, image: Tensor) -> tuple[dict[str, dict[str, Array]], dict[str, float]]:
    """Return the masks that the student's method makes for an image; nothing is changed.

    Args:
        student: perhaps with a distillation.
        image: (3, H, W) in [0, 1], on the student's device.

    Returns:
        Level -> kind -> masks, as ``Distiller.masks`` without the batch; and level -> pixels of the image per position.
        Both are empty if there is no method that makes masks without annotations.
    """
    attached = getattr(student, "distillation", None)
    if not isinstance(attached, Distillation):
        return {}, {}
    batch, sizes = normalized_batch(student, [image])
    masks = {
        level: {kind: mask[0].float().cpu().numpy() for kind, mask in kinds.items()}
        for level, kinds in attached.observe(batch).items()
    }
    scale = image.shape[1] / sizes[0][0]
    shapes = attached.shapes["student"]
    return masks, {level: shapes[level].stride * scale for level in masks}


def draw_masks(student: nn.Module, data: Images, device: torch.device, *, count: int = MASKED) -> Array | None:
    """Draw the spatial masks of a few images of a dataset, a row for each level of an image.

    Returns:
        A picture, uint8 RGB (H, W, 3); None if there is no method with spatial masks.
    """
    panels = []
    for index in spread(len(data), count):
        image = data[index][0]
        masks, strides = masks_of(student, image.to(device))
        spatial = {level: kinds["spatial"] for level, kinds in masks.items() if "spatial" in kinds}
        if not spatial:
            return None
        panels.append(mask_panel(_pixels(image), spatial, strides))
    return stack(panels)


def _pixels(image: Tensor) -> Array:
    return np.ascontiguousarray((image * 255).round().byte().permute(1, 2, 0).numpy())


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
