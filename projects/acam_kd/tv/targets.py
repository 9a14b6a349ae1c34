"""From torchvision's images and targets to the plain tensors that methods may need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core import IGNORED, LOGITS, MethodTap, Targets
from ..data.labels import IGNORED as UNLABELLED
from .segmentation import Segmentor

__all__ = ["ReadTargets"]


class ReadTargets:
    """Boxes and image sizes of a detector's batch, which it resizes itself; of a segmentation model the pixels' labels.

    Args:
        student: what it resized in its last training forward is read.
    """

    def __init__(self, student: nn.Module) -> None:
        self._student = student
        self._resized = None if isinstance(student, Segmentor) else MethodTap(student.transform, "forward")  # type: ignore[arg-type]

    def __call__(self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]]) -> Targets:
        """Of the batch that the student was just trained with."""
        if self._resized is None:
            segmentor: Any = self._student
            labels = segmentor.labels(targets)
            sizes = [segmentor.batch([image]).shape[-2:] for image in images]
            return Targets(
                image_sizes=torch.tensor(sizes, dtype=torch.float32, device=labels.device),
                labels={LOGITS: labels.masked_fill(labels == UNLABELLED, IGNORED)},
            )
        _, (batch, resized) = self._resized.last()
        boxes = [target["boxes"] for target in resized]
        owners = [torch.full((len(b),), i, device=b.device) for i, b in enumerate(boxes)]
        return Targets(
            boxes=torch.cat(boxes),
            box_images=torch.cat(owners),
            image_sizes=torch.tensor(batch.image_sizes, dtype=torch.float32, device=batch.tensors.device),
        )
