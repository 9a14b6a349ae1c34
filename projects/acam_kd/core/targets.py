"""What is known about a batch besides its pixels, as plain tensors that both engines fill."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["IGNORED", "Targets"]

IGNORED = -1
"""The label of a position that is not compared."""


def _none(*shape: int) -> Tensor:
    return torch.zeros(shape)


@dataclass(frozen=True)
class Targets:
    """The annotations that methods may need; a method says which in ``Distiller.needs``.

    Args:
        boxes: (B, 4), corners x0, y0, x1, y1 in pixels of the batch, the boxes of all images one after the other.
        box_images: (B,) int64, the image of each box.
        image_sizes: (N, 2), height and width of each image in pixels of the batch, without the padding.
        labels: level of logits -> (N, H, W) int64, the class of every position; ``IGNORED`` where there is none to
            compare, and the number of classes for the background of predictions that have no channel for it.
    """

    boxes: Tensor = field(default_factory=lambda: _none(0, 4))
    box_images: Tensor = field(default_factory=lambda: _none(0).long())
    image_sizes: Tensor = field(default_factory=lambda: _none(0, 2))
    labels: Mapping[str, Tensor] = field(default_factory=dict)
