"""A Detectron2 model in the form in which it is exported: tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from detectron2.export import TracingAdapter
from detectron2.modeling import GeneralizedRCNN, SemanticSegmentor
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.onnx import symbolic_helper

from ..export.checked import OPSET
from ..export.exported import DETECTION, INSTANCES, SEGMENTATION
from .reppoints import DeformConv

__all__ = ["DeployedD2", "outputs_of"]

DEFORMABLE = 19
"""The first opset of ONNX that has deformable convolutions."""


def outputs_of(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a model's outputs."""
    if isinstance(model, SemanticSegmentor):
        return SEGMENTATION
    return INSTANCES if getattr(getattr(model, "roi_heads", None), "mask_on", False) else DETECTION


class DeployedD2(nn.Module):
    """A Detectron2 model that takes images of the size that it is to have, and returns tensors.

    Args:
        model: in evaluation mode.
        order: of its channels, ``"BGR"`` or ``"RGB"``.
        ids: the dataset's id of each class.
    """

    ids: Tensor

    def __init__(self, model: nn.Module, order: str, ids: Sequence[int]) -> None:
        super().__init__()
        self.order = order
        self.register_buffer("ids", torch.tensor([*ids] or [*range(1, 1000)]))
        self.opset = DEFORMABLE if any(isinstance(m, DeformConv) for m in model.modules()) else OPSET
        self.outputs, self.model = outputs_of(model), model
        if self.outputs != SEGMENTATION:
            self.model = TracingAdapter(model, [{"image": torch.zeros(3, 64, 64)}], self._detect)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Predict images; see ``tv.deployed.Deployed``. Labels are the dataset's ids, those of a map class numbers."""
        pixels = images * 255
        pixels = pixels.flip(1) if self.order == "BGR" else pixels
        return (self._label_maps(pixels),) if self.outputs == SEGMENTATION else tuple(self.model(pixels[0]))

    def exporting(self) -> AbstractContextManager[Any]:
        """Return a context for torch.export, in which nothing is to be changed."""
        return nullcontext()

    def _label_maps(self, pixels: Tensor) -> Tensor:
        model: Any = self.model
        height, width = pixels.shape[2:]
        features = model.backbone(_padded((pixels - model.pixel_mean) / model.pixel_std, model.backbone))
        logits, _ = model.sem_seg_head(features)
        if torch.compiler.is_exporting():  # by numbers, since it would compare the size with the padded one
            rows, columns = (torch.arange(n, device=pixels.device) for n in (height, width))
            return logits.index_select(2, rows).index_select(3, columns).argmax(1)  # type: ignore[no-any-return]
        return logits[:, :, :height, :width].argmax(1)  # type: ignore[no-any-return]

    def _detect(self, model: Any, inputs: list[dict[str, Tensor]]) -> tuple[Tensor, ...]:
        if isinstance(model, GeneralizedRCNN):
            (found,) = model.inference(inputs, do_postprocess=False)
        else:
            images = model.preprocess_image(inputs)
            features = model.backbone(images.tensor)
            levels = [features[name] for name in model.head_in_features]
            (found,) = model.forward_inference(images, levels, model.head(levels))
        height, width = inputs[0]["image"].shape[1:]
        boxes, kept = _clipped(found.pred_boxes.tensor, height, width)
        boxes, scores, labels = boxes[kept], found.scores[kept], self.ids[found.pred_classes][kept]
        if self.outputs == DETECTION:
            return boxes, scores, labels
        return boxes, scores, labels, _pasted(found.pred_masks[kept], boxes, height, width)


def _padded(images: Tensor, backbone: Any) -> Tensor:
    """Pad normalised images as Detectron2's ``ImageList`` does."""
    constraints = backbone.padding_constraints
    multiple = max(backbone.size_divisibility, constraints.get("size_divisibility", 0), 1)
    if multiple == 1:
        return images
    height, width = images.shape[2:]
    return F.pad(images, [0, -width % multiple, 0, -height % multiple])


def _clipped(boxes: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Clip boxes (K, 4) to the image, and say which are not empty then, as Detectron2 does after the inference."""
    x, y = (
        boxes[:, axis::2].clamp_min(0).minimum(boxes.new_zeros(1) + side) for axis, side in ((0, width), (1, height))
    )
    clipped = torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], 1)
    return clipped, (x[:, 1] > x[:, 0]) & (y[:, 1] > y[:, 0])


def _pasted(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Put masks (K, 1, m, m) to the place of their boxes in an image, (K, 1, height, width)."""
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)
    rows, columns = (torch.arange(n, device=boxes.device) + 0.5 for n in (height, width))
    y, x = 2 * (rows - y0) / (y1 - y0) - 1, 2 * (columns - x0) / (x1 - x0) - 1
    shape = (boxes.shape[0], height, width)  # len would be a constant in a trace
    grid = torch.stack([x[:, None, :].expand(shape), y[:, :, None].expand(shape)], 3)
    return F.grid_sample(masks, grid, align_corners=False)


def _deform_conv(graph: Any, x: Any, weight: Any, offset: Any, mask: Any, bias: Any, *rest: Any) -> Any:
    """Write torchvision's deformable convolution as the operator of ONNX, which the exporter does not know."""
    numbers = [symbolic_helper._maybe_get_const(value, "i") for value in rest]
    stride, padding, dilation = numbers[:2], numbers[2:4], numbers[4:6]
    inputs = [x, weight, offset, bias, mask] if numbers[8] else [x, weight, offset, bias]
    shape = symbolic_helper._get_tensor_sizes(weight)[2:]
    return graph.op(
        "DeformConv", *inputs, kernel_shape_i=shape, strides_i=stride, pads_i=padding * 2, dilations_i=dilation,
        group_i=numbers[6], offset_group_i=numbers[7],
    )  # fmt: skip


torch.onnx.register_custom_op_symbolic("torchvision::deform_conv2d", _deform_conv, DEFORMABLE)  # type: ignore[attr-defined]
