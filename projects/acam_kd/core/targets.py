"""The annotations of a batch as plain tensors, which every engine fills."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

__all__ = ["IGNORED", "Targets"]

IGNORED = -1
"""The label of a position that is not compared."""


@dataclass(frozen=True)
class Targets:
    """The annotations that methods may need; a method names them in ``Distiller.needs``.

    ``None`` stands for boxes that are unknown. An image without objects is no unknown: it has an empty tensor.

    Args:
        boxes: (B, 4), corners x0, y0, x1, y1 in pixels of the batch, the boxes of all images one after the other.
        box_images: (B,) int64, the image of each box.
        image_sizes: (N, 2), height and width of each image in pixels of the batch, without the padding.
        ids: (N,) int64, the number of each image in its dataset, from 0.
        labels: level of logits -> (N, H, W) int64, the class of every position; ``IGNORED`` where there is none to
            compare, and the number of classes for the background of predictions that have no channel for it.
        scores: the student's level -> (N, 1, H, W), the largest probability of a class that the teacher's own head
            gives at each position; see ``core/scores.py``. They are known to methods that need them.

    Example:
        >>> import torch
        >>> boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0]])
        >>> one_box = Targets(boxes, torch.tensor([0]), torch.tensor([[32.0, 32.0]]))
        >>> one_box.labels
        {}
    """

    boxes: Tensor | None = None
    box_images: Tensor | None = None
    image_sizes: Tensor | None = None
    ids: Tensor | None = None
    labels: Mapping[str, Tensor] = field(default_factory=dict)
    scores: Mapping[str, Tensor] = field(default_factory=dict)
