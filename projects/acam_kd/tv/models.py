"""torchvision's detectors and segmentation models by name, on any of its ResNets and MobileNets.

Names are torchvision's own, as ``fcos_resnet50_fpn`` or ``deeplabv3_resnet101``. Of its pyramid detectors there
are more: ``<detector>_<trunk>_fpn<channels>``, as ``fcos_resnet18_fpn`` or ``retinanet_mobilenet_v2_fpn64``,
built from torchvision's own classes, where ``<channels>`` is the width of the pyramid, 256 if left out. With ``_bn`` at
the end the pyramid has batch normalisation: from scratch its features otherwise grow to any scale.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision.models import get_model, get_model_weights, list_models
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from .segmentation import Segmentor

__all__ = ["PROBE", "build_model", "is_segmentation", "plain"]

PYRAMID_DETECTORS = {
    "fcos": partial(FCOS, score_thresh=0.05),  # COCO's AP wants the low scores too; torchvision's default is 0.2
    "retinanet": RetinaNet,
    "fasterrcnn": FasterRCNN,
    "maskrcnn": MaskRCNN,
}
COMPOSED = re.compile(rf"({'|'.join(PYRAMID_DETECTORS)})_((?:resn|wide_resn|mobilen).+)_fpn(\d*)(_bn)?")
DETECTION = {name for name in list_models(module=torchvision.models.detection) if "keypoint" not in name}
SEGMENTATION = set(list_models(module=torchvision.models.segmentation))
TRUNKS = {n for n in list_models(module=torchvision.models) if re.match("resnet|resnext|wide_resnet|mobilenet", n)}
PROBE = 256
"""Side of the image by which strides are measured."""


def is_segmentation(name: str) -> bool:
    """Whether a name means a model that labels pixels."""
    return name in SEGMENTATION


def build_model(
    name: str,
    *,
    num_classes: int | None,
    size: int | None = None,
    weights: str | None = None,
    backbone_weights: str | None = None,
) -> nn.Module:
    """Build a detector, or a segmentation model within its criterion.

    Args:
        name: see the module.
        num_classes: with the background, as torchvision counts; None for that of ``weights``.
        size: the shorter side that images are resized to inside the model; None for torchvision's 800 in
            detectors, for no resizing in segmentation. SSD's is fixed.
        weights: a name of torchvision's weights for the whole model, as ``DEFAULT``, or None.
        backbone_weights: the same for the backbone; of a detector's the beginning is then frozen.

    Raises:
        ValueError: an unknown name of a model or of weights.
    """
    if name not in DETECTION | SEGMENTATION and not _composed(name):
        raise ValueError(
            f"no model is called {name!r}; known: {', '.join(sorted(DETECTION | SEGMENTATION))}, and "
            f"({'|'.join(PYRAMID_DETECTORS)})_TRUNK_fpn[CHANNELS][_bn] with TRUNK one of {', '.join(sorted(TRUNKS))}"
        )
    arguments: dict[str, Any] = {} if size is None or name in SEGMENTATION else _sizes(name, size)
    if name not in DETECTION | SEGMENTATION:
        if weights:
            raise ValueError(f"torchvision has no weights for {name}; give a file, or weights for its backbone")
        return _compose(name, num_classes or 91, backbone_weights, arguments)
    if name.startswith("ssdlite") and backbone_weights:
        raise ValueError(f"{name} cannot start from its backbone's weights: torchvision gives it another shape then")
    if name.startswith("ssd300") and backbone_weights == "DEFAULT":
        backbone_weights = "IMAGENET1K_FEATURES"  # the ones that its normalisation of pixels is for
    _check_weights(name, weights)
    _check_weights(
        max((trunk for trunk in list_models(module=torchvision.models) if trunk in name), key=len), backbone_weights
    )
    if name in SEGMENTATION and not name.startswith("lraspp"):
        arguments["aux_loss"] = True
    if name.startswith("fcos"):
        arguments["score_thresh"] = 0.05
    arguments["num_classes"] = None if weights else num_classes
    built = _get(name, weights=weights, weights_backbone=backbone_weights, **arguments)
    if name not in SEGMENTATION:
        return built  # type: ignore[no-any-return]
    if not weights and not backbone_weights:
        _quicken(built)
    return Segmentor(built, size=size)


def _quicken(model: nn.Module) -> None:
    """Running statistics as fast as torch's default.

    MobileNetV3's momentum, 0.01, is for weights of torchvision and long runs: from a random start, statistics that lag
    behind let the model predict one class in evaluation after hundreds of steps. With weights from a file it does no
    harm. Nothing of it is in the state.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1


def _composed(name: str) -> re.Match[str] | None:
    match = COMPOSED.fullmatch(name)
    return match if match and match[2] in TRUNKS else None


def _sizes(name: str, size: int) -> dict[str, Any]:
    if name.startswith("ssd"):
        return {}  # theirs is fixed
    return {"min_size": size, "max_size": size * 5 // 3}  # as 800 and 1333


def _check_weights(name: str, weights: str | None) -> None:
    known = ["DEFAULT", *(entry.name for entry in get_model_weights(name))]
    if weights and weights not in known:
        raise ValueError(f"no weights of {name} are called {weights!r}; known: {', '.join(known)}, or a file")


def _get(name: str, **arguments: Any) -> Any:
    try:
        return get_model(name, **arguments)
    except OSError as error:
        raise ValueError(f"the weights of {name} cannot be downloaded: {error}") from error


def _compose(name: str, num_classes: int, backbone_weights: str | None, arguments: dict[str, Any]) -> nn.Module:
    match = _composed(name)
    assert match
    detector, trunk, channels = match[1], match[2], int(match[3] or 256)
    if channels == 0 or (detector == "fcos" and channels % 32):
        raise ValueError(f"{name}: a pyramid cannot be {channels} wide; FCOS's has to be a multiple of 32")
    _check_weights(trunk, backbone_weights)
    norm = FrozenBatchNorm2d if backbone_weights else nn.BatchNorm2d
    body, taps = _stages(trunk, backbone_weights, norm)
    dense = detector in ("fcos", "retinanet")
    strides = (8, 16, 32) if dense else (4, 8, 16, 32)
    backbone = BackboneWithFPN(
        body,
        {taps[stride][0]: str(number) for number, stride in enumerate(strides)},
        [taps[stride][1] for stride in strides],
        channels,
        extra_blocks=LastLevelP6P7(channels, channels) if dense else LastLevelMaxPool(),
        norm_layer=nn.BatchNorm2d if match[4] else None,
    )
    model: nn.Module = PYRAMID_DETECTORS[detector](backbone, num_classes, **arguments)
    return model


@torch.no_grad()
def _stages(trunk: str, weights: str | None, norm: type[nn.Module]) -> tuple[nn.Module, dict[int, tuple[str, int]]]:
    """A classifier without its head, and stride -> (name of the last child of that stride, its channels).

    With weights, what comes before stride 8 is frozen, as Detectron2 does.
    """
    body = _get(trunk, weights=weights, norm_layer=norm)
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


def plain(model: nn.Module) -> nn.Module:
    """Torchvision's own model: the one that is saved and that anybody can load."""
    return model.network if isinstance(model, Segmentor) else model
