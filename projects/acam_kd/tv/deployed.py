"""A model in the form in which it is exported: tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torchvision.models.detection import transform
from torchvision.ops import boxes as box_ops

from ..export.checked import OPSET
from ..export.exported import CLASSIFICATION, DETECTION, INSTANCES, SEGMENTATION
from .classification import CROPPED_FROM, SMALL, Classifier
from .segmentation import Segmentor

__all__ = ["Deployed", "outputs_of"]


def outputs_of(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a model's outputs in evaluation."""
    if isinstance(model, Segmentor):
        return SEGMENTATION
    if isinstance(model, Classifier):
        return CLASSIFICATION
    return INSTANCES if isinstance(model, torchvision.models.detection.MaskRCNN) else DETECTION


class Deployed(nn.Module):
    """A detector, a segmentation model or a classifier that takes one tensor, resizes inside, and returns tensors.

    Args:
        model: from ``build_model``; it is put into evaluation mode.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.outputs, self.opset = outputs_of(model), OPSET
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Predict images.

        Args:
            images: (N, 3, H, W), RGB in [0, 1]; N is 1 for a detector.

        Returns:
            The label maps (N, H, W) of a segmentation model; a classifier's probabilities (N, K); else boxes (K, 4) as
            x0, y0, x1, y1 in pixels, scores (K,), labels (K,), and, of Mask R-CNN, masks (K, 1, H, W).
        """
        if isinstance(self.model, Segmentor):
            return (_label_maps(self.model, images),)
        if isinstance(self.model, Classifier):
            return (_probabilities(self.model, images),)
        with _sizes_in_double() if torch.jit.is_tracing() else nullcontext():  # type: ignore[attr-defined,no-untyped-call]
            (found,) = self.model([images[0]])
        return tuple(found[name] for name in self.outputs)

    def exporting(self) -> AbstractContextManager[None]:
        """Let torchvision's suppression of boxes by class go one way for all numbers of boxes, for torch.export."""
        return _one_way_nms()


@contextmanager
def _one_way_nms() -> Iterator[None]:
    def batched_nms(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> Tensor:
        beyond = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).max() + 1  # classes are moved apart by that
        return box_ops.nms(boxes + (labels.to(boxes) * beyond)[:, None], scores, threshold)

    before, box_ops.batched_nms = box_ops.batched_nms, batched_nms
    try:
        yield
    finally:
        box_ops.batched_nms = before


@contextmanager
def _sizes_in_double() -> Iterator[None]:
    """Let a trace compute the sizes of resized images as torchvision does outside of one.

    In a trace torchvision computes them in float32, where 428 * (160 / 428) is below 160, and a side loses a pixel.
    """

    def resized(image: Tensor, shorter: int, longest: int, target: Any = None, fixed_size: Any = None) -> Any:
        if fixed_size is not None:
            return before(image, shorter, longest, target, fixed_size)
        sides = torch._shape_as_tensor(image)[-2:].double()
        # Not 0-d: the exporter to ONNX would compute in float32 with them.
        first, second = (torch.tensor([float(x)], dtype=torch.float64) for x in (shorter, longest))
        first, second = first / sides.min(), second / sides.max()
        new = torch.floor(sides * torch.where(first < second, first, second)).long()
        return F.interpolate(image[None], [new[0], new[1]], mode="bilinear", align_corners=False)[0], target  # type: ignore[list-item]

    before, transform._resize_image_and_masks = transform._resize_image_and_masks, resized
    try:
        yield
    finally:
        transform._resize_image_and_masks = before


def _label_maps(model: Segmentor, images: Tensor) -> Tensor:
    mean, std = (torch.tensor(x, device=images.device).view(3, 1, 1) for x in (model.image_mean, model.image_std))
    x = images if model.size is None else _resized(images, model.size)
    logits = model.network((x - mean) / std)["out"]
    logits = F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=False)
    return logits.argmax(1)


def _probabilities(model: Classifier, images: Tensor) -> Tensor:
    """Cut squares out as ``Classifier`` does, and return the softmax, (N, K)."""
    mean, std = (torch.tensor(x, device=images.device).view(3, 1, 1) for x in (model.image_mean, model.image_std))
    size = model.size
    x = _resized(images, size if size < SMALL else round(size * CROPPED_FROM))
    for axis in (2, 3):
        x = x.narrow(axis, (x.shape[axis] - size) // 2, size)
    output = model.network((x - mean) / std)
    return (output if isinstance(output, Tensor) else output[0]).float().softmax(1)


def _resized(images: Tensor, size: int) -> Tensor:
    """Resize as ``Segmentor`` does, with sizes that a trace keeps as variables."""
    height, width = images.shape[2:]
    if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        sides = torch._shape_as_tensor(images)[2:].double()
        new = torch.round(sides * size / sides.min()).long()
        return F.interpolate(images, [new[0], new[1]], mode="bilinear", antialias=True, align_corners=False)  # type: ignore[list-item]
    shorter = min(height, width)
    shape = [(2 * side * size + shorter) // (2 * shorter) for side in (height, width)]  # torch.export knows no round
    return F.interpolate(images, shape, mode="bilinear", antialias=True, align_corners=False)
