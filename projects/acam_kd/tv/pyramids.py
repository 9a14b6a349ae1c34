"""Detectors with a feature pyramid on any trunk, by names as ``fcos_resnet18_fpn64_bn``; see ``models.py``."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision.models import list_models
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from ..core.errors import ConfigError
from .norms import SingleValueGroupNorm, quicken
from .timm_trunk import MARK, TimmPyramid, build_trunk, pixels_of
from .trunk import FREEZE_AT, freeze
from .zoo import check_weights, get

__all__ = ["PROBE", "PYRAMID_DETECTORS", "TRUNKS", "build_pyramid_detector", "is_pyramid_detector"]

PYRAMID_DETECTORS = {
    "fcos": partial(FCOS, score_thresh=0.05),  # COCO's AP counts low scores too; torchvision's default is 0.2
    "retinanet": RetinaNet,
    "fasterrcnn": FasterRCNN,
    "maskrcnn": MaskRCNN,
}
COMPOSED = re.compile(rf"({'|'.join(PYRAMID_DETECTORS)})_({MARK}.+|(?:resn|wide_resn|mobilen).+)_fpn(\d*)(_bn)?")
TRUNKS = {n for n in list_models(module=torchvision.models) if re.match("resnet|resnext|wide_resnet|mobilenet", n)}
PROBE = 256
"""The side of the image that strides are measured with."""


def is_pyramid_detector(name: str) -> bool:
    """Return whether a name means a detector with a pyramid that ``build_pyramid_detector`` builds."""
    return _composed(name) is not None


def _composed(name: str) -> re.Match[str] | None:
    match = COMPOSED.fullmatch(name)
    return match if match and (match[2] in TRUNKS or match[2].startswith(MARK)) else None


def build_pyramid_detector(
    name: str, num_classes: int, backbone_weights: str | None, arguments: dict[str, Any]
) -> nn.Module:
    """Build a detector from its name.

    Args:
        name: see the module.
        num_classes: with the background.
        backbone_weights: of the trunk, by torchvision's name, or of timm's ``DEFAULT``; its first stages are then
            frozen.
        arguments: more of torchvision's class, as the size of its images.

    Raises:
        ConfigError: the pyramid cannot have that width, or there are no such weights.
        RunError: the weights cannot be downloaded.
    """
    match = _composed(name)
    assert match
    detector, trunk, channels = match[1], match[2], int(match[3] or 256)
    if channels == 0 or (detector == "fcos" and channels % 32):
        raise ConfigError(
            "name",
            f"{name}, whose pyramid is {channels} wide",
            allowed="a width above 0, and for FCOS a multiple of 32",
        )
    dense = detector in ("fcos", "retinanet")
    strides = (8, 16, 32) if dense else (4, 8, 16, 32)
    pyramid_norm = nn.BatchNorm2d if match[4] else None
    if trunk.startswith(MARK):
        backbone, pixels = _timm(trunk.removeprefix(MARK), strides, channels, dense, pyramid_norm, backbone_weights)
        arguments = {**arguments, **pixels}
    else:
        check_weights(trunk, backbone_weights, "backbone_weights")
        norm = FrozenBatchNorm2d if backbone_weights else nn.BatchNorm2d
        body, taps = _stages(trunk, backbone_weights, norm)
        backbone = BackboneWithFPN(
            body,
            {taps[stride][0]: str(number) for number, stride in enumerate(strides)},
            [taps[stride][1] for stride in strides],
            channels,
            extra_blocks=_extra(channels, dense),
            norm_layer=pyramid_norm,
        )
    model: nn.Module = PYRAMID_DETECTORS[detector](backbone, num_classes, **arguments)
    if detector == "fcos":
        _take_any_size(model.head)
    return model


def _take_any_size(head: Any) -> None:
    """Let the norms of FCOS's towers take small images: at a width of 32 each of their groups has one channel."""
    for tower in (head.classification_head.conv, head.regression_head.conv):
        for place, layer in enumerate(tower):
            if isinstance(layer, nn.GroupNorm):
                tower[place] = SingleValueGroupNorm(layer.num_groups, layer.num_channels, layer.eps)


def _extra(channels: int, dense: bool) -> ExtraFPNBlock:
    """Build the levels on top of the trunk's: two of a dense detector, one of an R-CNN."""
    return LastLevelP6P7(channels, channels) if dense else LastLevelMaxPool()


def _timm(
    trunk: str,
    strides: tuple[int, ...],
    channels: int,
    dense: bool,
    norm: type[nn.Module] | None,
    weights: str | None,
) -> tuple[nn.Module, dict[str, list[float]]]:
    """Build timm's network with a pyramid, and return the statistics of its pixels as arguments of a detector."""
    if weights not in (None, "", "DEFAULT"):
        hint = f"a tag of timm's belongs to the name, as {MARK}resnet18.a1_in1k"
        raise ConfigError("backbone_weights", f"{weights} for {MARK}{trunk}", "DEFAULT, or a file", hint)
    body, indices, widths = build_trunk(trunk, strides, pretrained=bool(weights))
    if weights:
        freeze(body, FREEZE_AT, "frozen")
    else:
        quicken(body)
    mean, std = pixels_of(trunk, body)
    pyramid = TimmPyramid(body, indices, widths, channels, extra=_extra(channels, dense), norm=norm)
    return pyramid, {"image_mean": mean, "image_std": std}


@torch.no_grad()
def _stages(trunk: str, weights: str | None, norm: type[nn.Module]) -> tuple[nn.Module, dict[int, tuple[str, int]]]:
    """Build a classifier without its head, and map stride -> (name of the last child of that stride, its channels).

    With weights, the children before stride 8 are frozen, as in Detectron2.
    """
    body = get(trunk, weights=weights, norm_layer=norm)
    if "mobilenet" in trunk:
        body = body.features[:-1]  # without the 1x1 before its classifier
    else:
        del body.avgpool, body.fc
    taps: dict[int, tuple[str, int]] = {}
    x = torch.zeros(1, 3, PROBE, PROBE)
    body.eval()
    for name, child in body.named_children():
        x = child(x)
        stride = PROBE // x.shape[-1]
        taps[stride] = (name, x.shape[1])
        if weights and stride < 8:
            child.requires_grad_(False)
    return body.train(), taps
