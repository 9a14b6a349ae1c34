"""MobileNetV2's own detector and segmentation model, SSDLite and Mobile DeepLabV3, which torchvision lacks.

Both are those of "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (CVPR 2018), built from torchvision's parts.
The paper gives sizes, not layers, so the layers are those of TensorFlow's models. The sizes agree: 4.3 M parameters
and 0.8 G multiply-adds at 320 with COCO's 80 classes, 2.11 M and 2.75 G at 513 with 21 classes. With torchvision's 91
labels of COCO, ten of which no object has, SSDLite has 4.5 M parameters.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead, _extra_block, _normal_init
from torchvision.models.segmentation import DeepLabV3
from torchvision.models.segmentation.deeplabv3 import ASPP

__all__ = ["MOBILE_DEEPLAB", "SSDLITE", "DefaultBoxes", "SSDLiteBackbone", "build_mobile_deeplab", "build_ssdlite"]

SSDLITE, MOBILE_DEEPLAB = "ssdlite320_mobilenet_v2", "mobile_deeplabv3_mobilenet_v2"
NORM = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)
"""The norms outside of the trunk, those of torchvision's SSDLite."""
TAP = 14
"""The block that halves the map to stride 32; its expansion is the first map of SSDLite."""
EXTRAS = (512, 256, 256, 128)
WIDTH = 256
"""The width of Mobile DeepLabV3's head."""


class SSDLiteBackbone(nn.Module):
    """MobileNetV2 with four more maps: widths 576, 1280, 512, 256, 256, 128 at 20, 10, 5, 3, 2, 1 cells of 320 pixels.

    Args:
        body: the ``features`` of torchvision's MobileNetV2. They keep their names, so a classifier's file fits.
    """

    def __init__(self, body: nn.Sequential) -> None:
        super().__init__()
        self.body = body
        widths = (body[-1].out_channels, *EXTRAS)
        self.extra = nn.ModuleList(_extra_block(before, after, NORM) for before, after in zip(widths, EXTRAS))
        _normal_init(self.extra)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the six maps, from the finest, of (N, 3, H, W)."""
        maps = []
        for number, block in enumerate(self.body):
            if number == TAP:
                steps = list(block.conv)  # type: ignore[arg-type]
                x = steps[0](x)
                maps.append(x)
                block = nn.Sequential(*steps[1:])
            x = block(x)
        maps.append(x)
        for block in self.extra:
            maps.append(block(maps[-1]))
        return OrderedDict((str(number), x) for number, x in enumerate(maps))


class DefaultBoxes(DefaultBoxGenerator):
    """SSD's default boxes of scales 0.2 to 0.95, six a cell, but on the finest map three, as TensorFlow's SSDLite.

    Those three are a square of scale 0.1, and boxes of scale 0.2 with ratios 2 and 1/2.
    """

    def __init__(self) -> None:
        super().__init__([[2, 3]] * (2 + len(EXTRAS)), min_ratio=0.2, max_ratio=0.95)
        pairs = self._wh_pairs[0]
        self._wh_pairs[0] = torch.cat([pairs.new_full((1, 2), 0.1), pairs[2:4]])

    def num_anchors_per_location(self) -> list[int]:
        """Return the number of boxes of a cell, by level."""
        return [len(pairs) for pairs in self._wh_pairs]


def build_ssdlite(body: nn.Sequential, num_classes: int) -> SSD:
    """Build SSDLite at 320 pixels; pixels are normalised as ImageNet's, which torchvision's MobileNetV2 was trained on.

    Args:
        body: the ``features`` of torchvision's MobileNetV2.
        num_classes: with the background.

    Example:
        >>> from torchvision.models import mobilenet_v2
        >>> model = build_ssdlite(mobilenet_v2().features, num_classes=81)
        >>> f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M"
        '4.34 M'
    """
    boxes = DefaultBoxes()
    widths = [body[TAP].conv[0][0].out_channels, body[-1].out_channels, *EXTRAS]  # type: ignore[index, union-attr]
    return SSD(
        SSDLiteBackbone(body),
        boxes,
        (320, 320),
        num_classes,
        head=SSDLiteHead(widths, boxes.num_anchors_per_location(), num_classes, NORM),
        score_thresh=0.001,  # this and the next as torchvision's SSDLite
        nms_thresh=0.55,
        detections_per_img=300,
        topk_candidates=300,
    )


def build_mobile_deeplab(body: nn.Sequential, num_classes: int) -> DeepLabV3:
    """Build DeepLabV3 without the atrous branches of its ASPP, at output stride 16.

    The head stands on MobileNetV2's map of 320 channels: a 1x1 convolution beside the pooled image, a projection, the
    classes. Its last layer has the name that it has in torchvision's head, which has three more layers.

    Args:
        body: the ``features`` of torchvision's MobileNetV2; the last three stages are dilated in place.
        num_classes: with the background.

    Example:
        >>> from torchvision.models import mobilenet_v2
        >>> model = build_mobile_deeplab(mobilenet_v2().features, num_classes=21).eval()
        >>> model(torch.zeros(1, 3, 64, 64))["out"].shape
        torch.Size([1, 21, 64, 64])
    """
    body = body[:-1]  # without the 1x1 before its classifier
    for number, block in enumerate(body[TAP:]):
        depthwise: Any = block.conv[1][0]  # type: ignore[index, union-attr]
        depthwise.stride = (1, 1)
        if number:
            depthwise.dilation = depthwise.padding = (2, 2)
    width = body[-1].out_channels
    head = OrderedDict([("0", ASPP(width, [], WIDTH)), ("4", nn.Conv2d(WIDTH, num_classes, 1))])  # type: ignore[arg-type]
    return DeepLabV3(IntermediateLayerGetter(body, {str(len(body) - 1): "out"}), nn.Sequential(head))
