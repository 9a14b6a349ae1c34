"""torchvision's detectors, segmentation models and classifiers by name, on any of its ResNets and MobileNets.

Names are torchvision's own, as ``fcos_resnet50_fpn`` or ``deeplabv3_resnet101``. More pyramid detectors are built from
torchvision's classes: ``<detector>_<trunk>_fpn<channels>``, as ``fcos_resnet18_fpn`` or
``retinanet_mobilenet_v2_fpn64``. ``<channels>`` is the width of the pyramid, 256 if left out. With ``_bn`` at the end
the pyramid has batch normalisation; without it, features trained from scratch grow to any scale.
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

from ..core.errors import ConfigError, RunError
from .cifar_nets import CIFAR_NETS, build_cifar_net
from .classification import Classifier, usual_size
from .segmentation import Segmentor

__all__ = ["PROBE", "build_model", "is_classifier", "is_model", "is_segmentation", "plain"]

PYRAMID_DETECTORS = {
    "fcos": partial(FCOS, score_thresh=0.05),  # COCO's AP counts low scores too; torchvision's default is 0.2
    "retinanet": RetinaNet,
    "fasterrcnn": FasterRCNN,
    "maskrcnn": MaskRCNN,
}
COMPOSED = re.compile(rf"({'|'.join(PYRAMID_DETECTORS)})_((?:resn|wide_resn|mobilen).+)_fpn(\d*)(_bn)?")
DETECTION = {name for name in list_models(module=torchvision.models.detection) if "keypoint" not in name}
SEGMENTATION = set(list_models(module=torchvision.models.segmentation))
CLASSIFIERS = {*list_models(module=torchvision.models), *CIFAR_NETS}
TRUNKS = {n for n in list_models(module=torchvision.models) if re.match("resnet|resnext|wide_resnet|mobilenet", n)}
PROBE = 256
"""The side of the image that strides are measured with."""


def is_model(name: str) -> bool:
    """Return whether ``build_model`` knows a name."""
    return name in DETECTION | SEGMENTATION | CLASSIFIERS or _composed(name) is not None


def is_classifier(name: str) -> bool:
    """Return whether a name means a model that gives a class to each image."""
    return name in CLASSIFIERS


def is_segmentation(name: str) -> bool:
    """Return whether a name means a model that labels pixels."""
    return name in SEGMENTATION


def build_model(
    name: str,
    *,
    num_classes: int | None,
    size: int | None = None,
    weights: str | None = None,
    backbone_weights: str | None = None,
) -> nn.Module:
    """Build a detector, or a segmentation model or a classifier within its criterion.

    Args:
        name: see the module.
        num_classes: their number, of detectors and segmentation with the background; None for that of ``weights``.
        size: the shorter side that images are resized to inside the model. None means torchvision's 800 in detectors,
            and no resizing in segmentation. SSD's size is fixed. A classifier's is the side of its square images.
        weights: a name of torchvision's weights for the whole model, as ``DEFAULT``, or None.
        backbone_weights: the same for the backbone. The first stages of a detector's backbone are then frozen.

    Raises:
        ConfigError: no model or no weights have that name.
        RunError: the weights cannot be downloaded.
    """
    if not is_model(name):
        raise ConfigError(
            "name",
            name,
            allowed=f"one of {', '.join(sorted(DETECTION | SEGMENTATION))}, or "
            f"({'|'.join(PYRAMID_DETECTORS)})_TRUNK_fpn[CHANNELS][_bn] with TRUNK one of {', '.join(sorted(TRUNKS))}; "
            f"or, for classes of images, {', '.join(CIFAR_NETS)} or a classifier of torchvision's",
        )
    if is_classifier(name):
        return _classifier(name, num_classes, size or usual_size(name), weights, backbone_weights)
    arguments: dict[str, Any] = {} if size is None or name in SEGMENTATION else _sizes(name, size)
    if name not in DETECTION | SEGMENTATION:
        if weights:
            raise ConfigError(
                "weights",
                f"{weights} for {name}",
                allowed="a file, because torchvision has no weights of this model",
                hint="or give weights of its backbone, {backbone_weights}",
            )
        return _compose(name, num_classes or 91, backbone_weights, arguments)
    if name.startswith("ssdlite") and backbone_weights:
        raise ConfigError(
            "backbone_weights",
            f"{backbone_weights} for {name}",
            allowed="none, because torchvision gives the backbone another shape then",
        )
    if name.startswith("ssd300") and backbone_weights == "DEFAULT":
        backbone_weights = "IMAGENET1K_FEATURES"  # its normalisation of pixels is made for these
    _check_weights(name, weights)
    trunk = max((trunk for trunk in list_models(module=torchvision.models) if trunk in name), key=len)
    _check_weights(trunk, backbone_weights, "backbone_weights")
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


def _classifier(
    name: str, num_classes: int | None, size: int, weights: str | None, backbone_weights: str | None
) -> Classifier:
    """Build a classifier; with weights of its trunk alone the last layer is new."""
    if name in CIFAR_NETS:
        for argument, value in (("weights", weights), ("backbone_weights", backbone_weights)):
            if value:
                raise ConfigError(argument, f"{value} for {name}", "a file, because torchvision does not know this net")
        return Classifier(build_cifar_net(name, num_classes or 1000), size=size)
    for argument, value in (("weights", weights), ("backbone_weights", backbone_weights)):
        _check_weights(name, value, argument)
    arguments: dict[str, Any] = {"image_size": size} if name.startswith("vit_") else {}
    if name in ("googlenet", "inception_v3") and not (weights or backbone_weights):
        arguments |= {"aux_logits": False, "init_weights": False}
    elif name == "inception_v3":
        arguments["aux_logits"] = False
    if weights or backbone_weights:
        built = _get(name, weights=weights or backbone_weights, **arguments)
    else:
        built = _get(name, weights=None, num_classes=num_classes or 1000, **arguments)
    if backbone_weights and not weights:
        _renew_last_layer(built, num_classes or 1000)
    return Classifier(built, size=size)


def _renew_last_layer(network: nn.Module, num_classes: int) -> None:
    layers = [(path, part) for path, part in network.named_modules() if isinstance(part, (nn.Linear, nn.Conv2d))]
    path, last = layers[-1]
    parent = network.get_submodule(path.rpartition(".")[0])
    made: nn.Module = (
        nn.Linear(last.in_features, num_classes)
        if isinstance(last, nn.Linear)
        else nn.Conv2d(last.in_channels, num_classes, 1)
    )
    parent.add_module(path.rpartition(".")[2], made)


def _quicken(model: nn.Module) -> None:
    """Set the momentum of all running statistics to torch's default.

    MobileNetV3's own momentum, 0.01, is for pretrained weights and long runs. From a random start its statistics lag
    behind, and in evaluation the model then predicts one class even after hundreds of steps. For weights from a file
    the default does no harm. The momentum is not in the state.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1


def _composed(name: str) -> re.Match[str] | None:
    match = COMPOSED.fullmatch(name)
    return match if match and match[2] in TRUNKS else None


def _sizes(name: str, size: int) -> dict[str, Any]:
    if name.startswith("ssd"):
        return {}  # SSD's size is fixed
    return {"min_size": size, "max_size": size * 5 // 3}  # the ratio of 800 and 1333


def _check_weights(name: str, weights: str | None, argument: str = "weights") -> None:
    known = ["DEFAULT", *(entry.name for entry in get_model_weights(name))]
    if weights and weights not in known:
        raise ConfigError(argument, f"{weights} for {name}", allowed=f"one of {', '.join(known)}, or a file")


def _get(name: str, **arguments: Any) -> Any:
    try:
        return get_model(name, **arguments)
    except OSError as error:
        reason = " ".join(str(error).split())
        raise RunError(
            f"the weights cannot be downloaded ({reason})", where=name, remedy="check the network, or give a file"
        ) from error


def _compose(name: str, num_classes: int, backbone_weights: str | None, arguments: dict[str, Any]) -> nn.Module:
    match = _composed(name)
    assert match
    detector, trunk, channels = match[1], match[2], int(match[3] or 256)
    if channels == 0 or (detector == "fcos" and channels % 32):
        raise ConfigError(
            "name",
            f"{name}, whose pyramid is {channels} wide",
            allowed="a width above 0, and for FCOS a multiple of 32",
        )
    _check_weights(trunk, backbone_weights, "backbone_weights")
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
    """Build a classifier without its head, and map stride -> (name of the last child of that stride, its channels).

    With weights, the children before stride 8 are frozen, as in Detectron2.
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
    """Return torchvision's own model, which is saved and which anybody can load."""
    return model.network if isinstance(model, (Segmentor, Classifier)) else model
