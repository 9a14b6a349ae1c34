"""From Detectron2's inputs to the plain tensors that methods may need."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.structures import ImageList
from torch import nn

from ..core import IGNORED, LOGITS, Targets
from .taps import backbone_of

__all__ = ["ReadTargets"]


class ReadTargets:
    """Boxes, image sizes and, of a segmentor, the labels of all pixels of the batch.

    Args:
        student: pads its batches, and knows the label that it ignores.
    """

    def __init__(self, student: nn.Module) -> None:
        self._student = student

    def __call__(self, batched_inputs: list[dict[str, Any]]) -> Targets:
        """Of one batch, on the student's device."""
        device = next(self._student.parameters()).device
        sizes = torch.tensor([x["image"].shape[-2:] for x in batched_inputs], dtype=torch.float32, device=device)
        boxes, owners = [torch.zeros(0, 4)], [torch.zeros(0, dtype=torch.int64)]
        for i, x in enumerate(batched_inputs):
            if "instances" in x:
                boxes.append(x["instances"].gt_boxes.tensor)
                owners.append(torch.full((len(x["instances"]),), i))
        return Targets(
            boxes=torch.cat([b.to(device) for b in boxes]),
            box_images=torch.cat(owners).to(device),
            image_sizes=sizes,
            labels=self._labels(batched_inputs, device),
        )

    def _labels(self, batched_inputs: list[dict[str, Any]], device: torch.device) -> dict[str, torch.Tensor]:
        head: Any = getattr(self._student, "sem_seg_head", None)
        if head is None or "sem_seg" not in batched_inputs[0]:
            return {}
        backbone: Any = backbone_of(self._student)
        labels = ImageList.from_tensors(
            [x["sem_seg"].to(device) for x in batched_inputs],
            backbone.size_divisibility,
            head.ignore_value,
            backbone.padding_constraints,
        ).tensor
        return {LOGITS: labels.masked_fill(labels == head.ignore_value, IGNORED)}
